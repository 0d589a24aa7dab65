"""The drop-ins: each peer's own order of arguments, defaults and rules, against those rules written out in a loop."""

import inspect

import numpy as np
import pytest
import torch

import ssu_bridge
from ssu_bridge.compat import flashinfer, mamba_ssm, vllm

ORDERS = {
    mamba_ssm: "state x dt A B C D=None z=None dt_bias=None dt_softplus=False state_batch_indices=None",
    vllm: (
        "state x dt A B C D dt_bias z=None dt_softplus=False state_batch_indices=None dst_state_batch_indices=None "
        "null_block_id=0 out=None num_accepted_tokens=None cu_seqlens=None is_blackwell=False "
        "enable_stochastic_rounding=False cache_philox_rounds=0"
    ),
    flashinfer: (
        "state x dt A B C D z=None dt_bias=None dt_softplus=False state_batch_indices=None pad_slot_id=-1 "
        "state_scale=None out=None disable_state_update=False intermediate_states_buffer=None "
        "intermediate_state_indices=None intermediate_state_scales=None rand_seed=None philox_rounds=10 cache_steps=0 "
        "algorithm='auto' dst_state_batch_indices=None cu_seqlens=None num_accepted_tokens=None backend='auto'"
    ),
}


@pytest.mark.parametrize("peer", ORDERS)
def test_the_order_and_the_defaults(peer):
    parameters = inspect.signature(peer.selective_state_update).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    spelt = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in positional]
    assert " ".join(spelt) == ORDERS[peer]


H, P, N, G = 4, 8, 16, 2


def model(*rows, tied=True, slots=8, seed=0):
    """Random arguments with as many leading axes for tokens as rows has numbers, parameters as views if tied."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    A = -torch.exp(normal(H))[:, None, None].expand(H, P, N) if tied else -torch.exp(normal(H, P, N))
    dt = normal(*rows, H)[..., None].expand(*rows, H, P) if tied else normal(*rows, H, P)
    bias, D = ((normal(H)[:, None].expand(H, P) if tied else normal(H, P)) for _ in range(2))
    return {
        "state": normal(slots, H, P, N),
        "x": normal(*rows, H, P),
        "dt": dt,
        "A": A,
        "B": normal(*rows, G, N),
        "C": normal(*rows, G, N),
        "D": D,
        "z": normal(*rows, H, P),
        "dt_bias": bias,
    }


def wide(arguments):
    return {name: tensor.double().clone() for name, tensor in arguments.items()}


def token(a, row, state):
    """One token in float64: returns the output and the new state."""
    heads = torch.arange(H) // (H // G)
    d = torch.nn.functional.softplus(a["dt"][row] + a["dt_bias"])
    x, B, C, z = a["x"][row], a["B"][row][heads][:, None], a["C"][row][heads][:, None], a["z"][row]
    state = state * torch.exp(a["A"] * d[..., None]) + (d * x)[..., None] * B
    return ((state * C).sum(-1) + a["D"] * x) * z * torch.sigmoid(z), state


def close(got, expected):
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def _reference_where_the_cpu_backend_refuses():
    """What is tested is the translation; each backend is held against the reference elsewhere."""
    with ssu_bridge.using(backend="reference"):
        yield


# --- mamba_ssm ---


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_mamba_ssm(tied, backend):
    a = model(3, tied=tied)
    exact, held = wide(a), a["state"].clone()
    indices = torch.tensor([5, -7, 0])
    order = [a[n] for n in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    with ssu_bridge.using(backend=backend):
        out = mamba_ssm.selective_state_update(*order, True, indices)
    for row, slot in ((0, 5), (2, 0)):
        y, state = token(exact, row, exact["state"][slot])
        close(out[row], y)
        close(a["state"][slot], state)
    assert torch.equal(out[1], torch.zeros(H, P))  # a pad's output is zero, and its state is kept
    untouched = [1, 2, 3, 4, 6, 7]
    assert torch.equal(a["state"][untouched], held[untouched])


def test_mamba_ssm_for_mamba1_keeps_the_rank():
    rng = torch.Generator().manual_seed(1)
    state, x, dt = (torch.randn(*s, generator=rng) for s in ((2, P, N), (2, P), (2, P)))
    A, B, C = -torch.rand(P, N, generator=rng), torch.randn(2, N, generator=rng), torch.randn(2, N, generator=rng)
    before = state.clone().double()
    out = mamba_ssm.selective_state_update(state, x, dt, A, B, C)
    assert out.shape == x.shape
    d = dt.double()[..., None]
    after = before * torch.exp(A.double() * d) + d * x.double()[..., None] * B.double()[:, None]
    close(state, after)
    close(out, (after * C.double()[:, None]).sum(-1))


def test_any_layout_of_the_inputs():
    a = model(2, tied=False)
    spread = {n: torch.stack([t, t], -1)[..., 0] for n, t in a.items() if n != "state"}
    assert not any(tensor.is_contiguous() for tensor in spread.values())
    spread["D"] = torch.ones(()).expand(H, P)
    expected = mamba_ssm.selective_state_update(**{**a, "D": torch.ones(H, P), "state": a["state"].clone()})
    assert torch.equal(mamba_ssm.selective_state_update(**{**a, **spread}), expected)


# --- vLLM ---


def vllm_rule(a, out, lengths, read, write, accepted, null):
    """vLLM's rules over packed rows, in a loop: changes a["state"] and out."""
    state = a["state"].clone()
    row = 0
    for i, length in enumerate(lengths):
        column = 0 if accepted is None else max(int(accepted[i]) - 1, 0)
        start = int(read[i][column])
        s = torch.zeros(H, P, N, dtype=torch.float64) if start == null else a["state"][start]
        for t in range(length):
            out[row], s = token(a, row, s)
            row += 1
            if accepted is not None and start != null and int(write[i][t]) != null:
                state[int(write[i][t])] = s
        if accepted is None and length and start != null:
            state[int(write[i][0])] = s
    a["state"] = state


@pytest.mark.parametrize("name", ["null_block_id", "pad_slot_id"])
def test_vllm_one_token(name):
    a = model(4)
    exact, y = wide(a), torch.zeros(4, H, P, dtype=torch.float64)
    indices, out = torch.tensor([3, 0, 1, 0], dtype=torch.int32), torch.full((4, H, P), float("nan"))
    vllm_rule(exact, y, [1] * 4, indices[:, None], indices[:, None], None, 0)
    order = [a.pop(n) for n in ("state", "x", "dt", "A", "B", "C", "D", "dt_bias", "z")]
    assert vllm.selective_state_update(*order, True, indices, out=out, **{name: 0}) is None
    close(out, y)
    close(order[0], exact["state"])


@pytest.mark.parametrize("with_destinations", [True, False])
@pytest.mark.parametrize("with_counts", [True, False])
def test_vllm_packed(with_destinations, with_counts):
    lengths, slots = [2, 0, 1, 3], 16
    a = model(6, slots=slots)
    exact, y = wide(a), torch.zeros(6, H, P, dtype=torch.float64)
    read = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 0], [9, 10, 11]])
    write = torch.tensor([[1, 12, 3], [4, 5, 6], [7, 8, 0], [13, 0, 14]]) if with_destinations else None
    accepted = torch.tensor([2, 1, 3, 0], dtype=torch.int32) if with_counts else None
    vllm_rule(exact, y, lengths, read, read if write is None else write, accepted, 0)
    out = torch.full((6, H, P), float("nan"))
    spare = torch.tensor([[15, 15, 15]])  # tables may have rows to spare
    vllm.selective_state_update(
        **a,
        dt_softplus=True,
        state_batch_indices=torch.cat([read, spare]),
        dst_state_batch_indices=None if write is None else torch.cat([write, spare]),
        out=out,
        num_accepted_tokens=accepted,
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
    )
    close(out, y)
    close(a["state"], exact["state"])


def test_vllm_stochastic_rounding():
    a = model(2)
    state, indices = a.pop("state").half(), torch.tensor([3, 1])
    results = []
    for _ in range(2):
        new = state.clone()
        vllm.selective_state_update(
            new, **a, state_batch_indices=indices, out=torch.empty(2, H, P), enable_stochastic_rounding=True
        )
        results.append(new)
    assert not torch.equal(*results)  # a seed of its own for each call
    torch.testing.assert_close(*results, rtol=2e-3, atol=1e-6)


def test_vllm_needs_out():
    with pytest.raises(TypeError, match="out: expected a tensor"):
        vllm.selective_state_update(**model(2))


# --- FlashInfer ---


def test_flashinfer_one_token():
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


def test_flashinfer_keeps_the_axes_that_it_adds():
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
def test_flashinfer_intermediate_states(disabled, with_entries):
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


@pytest.mark.parametrize("with_destinations", [True, False])
def test_flashinfer_packed(with_destinations):
    lengths, slots = [2, 0, 1, 3], 16
    a = model(6, slots=slots)
    exact = wide(a)
    read = torch.tensor([[1, 2, 3], [4, 5, 6], [7, -1, 0], [9, 10, 11]])
    write = torch.tensor([[1, 12, 3], [4, 5, 6], [7, 8, 0], [13, -1, 14]]) if with_destinations else None
    accepted = torch.tensor([2, 1, 2, 0])
    out = flashinfer.selective_state_update(
        **a,
        dt_softplus=True,
        state_batch_indices=read,
        dst_state_batch_indices=write,
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
def test_flashinfer_int16(axes):
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


def test_flashinfer_seed():
    a = model(2)
    state, seed = a.pop("state").half(), torch.tensor([123])
    results = []
    for rounds in (10, 10, 7):
        results.append(state.clone())
        flashinfer.selective_state_update(results[-1], **a, rand_seed=seed, philox_rounds=rounds)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], state)
    with pytest.raises(ValueError, match="philox_rounds: expected at least 1, got 0"):
        flashinfer.selective_state_update(state, **a, rand_seed=seed, philox_rounds=0)
    with pytest.raises(ValueError, match="rand_seed: expected None with state_scale"):
        flashinfer.selective_state_update(state, **a, rand_seed=seed, state_scale=torch.ones(8, H, P))


def test_flashinfer_names_of_kernels():
    a = model(2)
    for algorithm in ("auto", "simple", "vertical", "horizontal", "async_horizontal"):
        for backend in ("auto", "flashinfer", "cake"):
            flashinfer.selective_state_update(**a, dt_softplus=True, algorithm=algorithm, backend=backend)
    with pytest.raises(ValueError, match="algorithm: expected"):
        flashinfer.selective_state_update(**a, algorithm="best")
    with pytest.raises(ValueError, match="backend: expected auto, flashinfer or cake, got 'triton'"):
        flashinfer.selective_state_update(**a, backend="triton")


def test_no_drop_in_is_imported_with_the_package():
    assert "compat" not in ssu_bridge.__all__
