"""The drop-in for FlashInfer, against its rules written out in a loop."""

import numpy as np
import pytest
import torch
from drop_ins import H, N, P, close, model, token, wide

import ssu_bridge
from ssu_bridge.compat import flashinfer

pytestmark = pytest.mark.usefixtures("each_drop_in_backend")


def test_one_token():
    a = model(3)
    exact = wide(a)
    order = [a[n] for n in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    pads = torch.tensor([99, 2, 99])
    out = flashinfer.selective_state_update(
        *order, True, pads, 99, num_accepted_tokens=torch.ones(3), intermediate_states_buffer=torch.ones(1)
    )
    for row, slot in enumerate(pads.tolist()):
        start = exact["state"][slot] if slot != 99 else torch.zeros(H, P, N)
        y, state = token(exact, row, start)
        close(out[row], y)
        if slot != 99:
            exact["state"][slot] = state
    close(a["state"], exact["state"])


def test_keeps_the_axes_that_it_adds():
    state, x = torch.randn(2, P, N), torch.randn(2, P)
    A, B, D = -torch.rand(P, N), torch.randn(2, N), torch.randn(P)
    one = flashinfer.selective_state_update(state.clone(), x, x, A, B, B, D)
    assert one.shape == (2, 1, P)
    several = flashinfer.selective_state_update(state.clone(), x, x, A, B, B, D, cache_steps=1)
    assert several.shape == (2, 1, 1, P)
    assert torch.equal(several[:, 0], one)
    out = torch.empty(2, 1, P)
    assert flashinfer.selective_state_update(state, x, x, A, B, B, D, out=out) is out
    assert torch.equal(out, one)


@pytest.mark.parametrize("disabled", [True, False])
@pytest.mark.parametrize("with_entries", [True, False])
def test_intermediate_states(disabled, with_entries):
    T = 3
    a = model(2, T)
    exact = wide(a)
    buffer = torch.full((9, T + 1, H, P, N), 7.0)
    indices, entries = torch.tensor([4, 1]), torch.tensor([8, 0]) if with_entries else None
    out = flashinfer.selective_state_update(
        **a,
        dt_softplus=True,
        state_batch_indices=indices,
        disable_state_update=disabled,
        intermediate_states_buffer=buffer,
        intermediate_state_indices=entries,
        cache_steps=T + 1,
    )
    expected = torch.full_like(buffer, 7.0).double()
    states = exact["state"].clone()
    for i in range(2):
        s = exact["state"][indices[i]]
        for t in range(T):
            y, s = token(exact, (i, t), s)
            close(out[i, t], y)
            expected[(indices if entries is None else entries)[i], t] = s
        states[indices[i]] = s
    close(buffer, expected)
    close(a["state"], exact["state"] if disabled else states)


@pytest.mark.parametrize("cache_steps", [0, 3])
def test_several_tokens_are_an_axis_even_beside_cu_seqlens(cache_steps):
    a = model(2, 3)
    exact = wide(a)
    edges = torch.tensor([0, 1, 6])  # which count for x of three axes alone
    out = flashinfer.selective_state_update(**a, dt_softplus=True, cu_seqlens=edges, cache_steps=cache_steps)
    for i in range(2):
        for t in range(3):
            y, exact["state"][i] = token(exact, (i, t), exact["state"][i])
            close(out[i, t], y)
    close(a["state"], exact["state"])


@pytest.mark.parametrize("packed", [True, False])
def test_counts_beside_one_slot_a_sequence(packed):
    """Its table of one column is that column for every count."""
    lengths = [3, 3] if not packed else [1, 3]
    a = model(sum(lengths))
    if not packed:
        a |= {name: a[name].unflatten(0, (2, 3)) for name in ("x", "dt", "B", "C", "z")}
    again = {**a, "state": a["state"].clone()}
    more = {"cu_seqlens": torch.tensor([0, *np.cumsum(lengths)])} if packed else {}
    slots, counts = torch.tensor([6, 2]), torch.tensor([3, 0, 99])  # with a row to spare
    expected = flashinfer.selective_state_update(**again, **more, cache_steps=3, state_batch_indices=slots)
    out = flashinfer.selective_state_update(
        **a, **more, cache_steps=3, state_batch_indices=slots, num_accepted_tokens=counts
    )
    assert torch.equal(out, expected)
    assert torch.equal(a["state"], again["state"])


@pytest.mark.parametrize("with_destinations", [True, False])
def test_packed(with_destinations):
    lengths, slots = [2, 0, 1, 3], 16
    a = model(6, slots=slots)
    exact = wide(a)
    read = torch.tensor([[1, 2, 3], [4, 5, 6], [7, -1, 0], [9, 10, 11]])
    write = torch.tensor([[1, 12, 3], [4, 5, 6], [7, 8, 0], [13, -1, 14]]) if with_destinations else None
    accepted = torch.tensor([2, 1, 2, 0])
    out = flashinfer.selective_state_update(
        **a,
        dt_softplus=True,
        state_batch_indices=torch.cat([read, read]),  # with rows to spare
        dst_state_batch_indices=None if write is None else torch.cat([write, read[:1]]),
        disable_state_update=with_destinations,  # which destinations override
        cu_seqlens=torch.tensor([0, 2, 2, 3, 6]),
        num_accepted_tokens=accepted,
        cache_steps=3,
    )
    row, states = 0, exact["state"].clone()
    for i, length in enumerate(lengths):
        start = int(read[i, max(int(accepted[i]) - 1, 0)])
        s = exact["state"][start] if start >= 0 else torch.zeros(H, P, N)
        for t in range(length):
            y, s = token(exact, row, s)
            close(out[row], y)
            row += 1
            if write is not None and start >= 0 and write[i, t] >= 0:
                states[write[i, t]] = s
        if write is None and length and start >= 0:
            states[start] = s
    close(a["state"], states)


@pytest.mark.parametrize("axes", [3, 4])
def test_int16(axes):
    T = 2
    a = model(2, T)
    state = a.pop("state")
    values, scale = ssu_bridge.QuantizedState.quantize(state, torch.int16)
    exact = wide({**a, "state": values.float() * scale[..., None]})
    buffer, scales = torch.zeros(8, T, H, P, N, dtype=torch.int16), torch.zeros(8, T, H, P)
    flashinfer.selective_state_update(
        values,
        **a,
        dt_softplus=True,
        state_batch_indices=torch.tensor([6, 3]),
        state_scale=scale if axes == 3 else scale[..., None],
        intermediate_states_buffer=buffer,
        intermediate_state_scales=scales,
        disable_state_update=True,
        cache_steps=T,
    )
    for i, slot in enumerate((6, 3)):
        s = exact["state"][slot]
        for t in range(T):
            _, s = token(exact, (i, t), s)
            got = buffer[slot, t].double() * scales[slot, t].double()[..., None]
            assert (abs(got - s) <= abs(s).amax(-1, keepdim=True) * 1e-4).all()


def test_seed():
    a = model(2)
    state, seed = a.pop("state").half(), torch.tensor([123])
    results = []
    for shape, rounds in (((1,), 10), ((1, 1), 10), ((), 7)):
        results.append(state.clone())
        seed = seed.reshape(shape)
        flashinfer.selective_state_update(results[-1], **a, rand_seed=seed, philox_rounds=rounds)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], state)
    with pytest.raises(ValueError, match="philox_rounds: expected at least 1, got 0"):
        flashinfer.selective_state_update(state, **a, rand_seed=seed, philox_rounds=0)
    with pytest.raises(ValueError, match="rand_seed: expected None with state_scale"):
        flashinfer.selective_state_update(state, **a, rand_seed=seed, state_scale=torch.ones(8, H, P))


@pytest.mark.parametrize(
    ("changed", "like"),
    [(n, "x") for n in ("B", "C", "z", "out")]
    + [("D", "dt"), ("dt_bias", "dt"), ("intermediate_states_buffer", "state")]
    + [(n, "state_batch_indices") for n in ("dst_state_batch_indices", "intermediate_state_indices")],
)
def test_asks_for_one_dtype(changed, like):
    T = 2
    a = {**model(2, T), "state_batch_indices": torch.tensor([3, 1])}
    a |= {"out": torch.empty(2, T, H, P), "intermediate_states_buffer": torch.zeros(8, T, H, P, N)}
    a |= {"intermediate_state_indices": torch.tensor([5, 0]), "dst_state_batch_indices": torch.tensor([2, 4])}
    kept = a["state"].clone()
    other = torch.int32 if changed.endswith("indices") else torch.bfloat16
    name = changed.removesuffix("_buffer")
    with pytest.raises(ValueError, match=f"{name}: expected {like}'s dtype"):
        flashinfer.selective_state_update(**{**a, changed: a[changed].to(other)})
    assert torch.equal(a["state"], kept)


def test_names_of_kernels():
    a = model(2)
    for algorithm in ("auto", "simple", "vertical", "horizontal", "async_horizontal"):
        for backend in ("auto", "flashinfer", "cake"):
            flashinfer.selective_state_update(**a, dt_softplus=True, algorithm=algorithm, backend=backend)
    with pytest.raises(ValueError, match="algorithm: expected"):
        flashinfer.selective_state_update(**a, algorithm="best")
    with pytest.raises(ValueError, match="backend: expected auto, flashinfer or cake, got 'triton'"):
        flashinfer.selective_state_update(**a, backend="triton")
