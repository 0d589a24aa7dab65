"""The drop-ins: each peer's own order of arguments, defaults and rules, against those rules written out in a loop."""

import inspect
import warnings

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
        return torch.randn(*shape, generator=rng, device="cpu").to(torch.get_default_device())

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


@pytest.fixture(autouse=True, params=["auto", "reference", pytest.param("triton", marks=pytest.mark.gpu)])
def _on_each_backend(request):
    device = "cuda" if request.param == "triton" else "cpu"
    with ssu_bridge.using(backend=request.param), torch.device(device):
        yield


# --- mamba_ssm ---


@pytest.mark.parametrize("tied", [True, False])
def test_mamba_ssm(tied):
    a = model(3, tied=tied)
    exact, held = wide(a), a["state"].clone()
    indices = torch.tensor([5, -7, 0])
    order = [a[n] for n in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    out = mamba_ssm.selective_state_update(*order, True, indices)
    for row, slot in ((0, 5), (2, 0)):
        y, state = token(exact, row, exact["state"][slot])
        close(out[row], y)
        close(a["state"][slot], state)
    assert torch.equal(out[1], torch.zeros(H, P))  # a pad's output is zero, and its state is kept
    untouched = [1, 2, 3, 4, 6, 7]
    assert torch.equal(a["state"][untouched], held[untouched])


def test_mamba_ssm_for_mamba1_keeps_the_rank():
    state, x, dt = (torch.randn(*shape) for shape in ((2, P, N), (2, P), (2, P)))
    A, B, C = -torch.rand(P, N), torch.randn(2, N), torch.randn(2, N)
    before = state.clone().double()
    out = mamba_ssm.selective_state_update(state, x, dt, A, B, C)
    assert out.shape == x.shape
    d = dt.double()[..., None]
    after = before * torch.exp(A.double() * d) + d * x.double()[..., None] * B.double()[:, None]
    close(state, after)
    close(out, (after * C.double()[:, None]).sum(-1))


# --- What all have in common ---


def spread(tensor):
    """The same numbers in every other place of a larger tensor."""
    return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)[..., 0]


def run(peer, a, **more):
    """Call a peer's function; return its output."""
    if peer is not vllm:
        return peer.selective_state_update(**a, **more)
    out = torch.full_like(a["x"], float("nan"), memory_format=torch.contiguous_format)
    vllm.selective_state_update(**a, out=out, **more)
    return out


@pytest.mark.parametrize("peer", ORDERS)
def test_any_layout_of_the_inputs(peer):
    a = model(2, tied=False)
    apart = {name: spread(tensor) for name, tensor in a.items() if name != "state"}
    assert not any(tensor.is_contiguous() for tensor in apart.values())
    apart["D"] = torch.ones(()).expand(H, P)
    expected = run(peer, {**a, "D": torch.ones(H, P), "state": a["state"].clone()})
    assert torch.equal(run(peer, {**a, **apart}), expected)


@pytest.mark.parametrize("peer", ORDERS)
def test_a_state_in_any_layout_is_updated_in_place(peer):
    a = model(2)
    state = spread(a["state"])
    apart = {**a, "state": state}
    with pytest.warns(RuntimeWarning, match="state: copied as a whole"):
        out = run(peer, apart)
    assert torch.equal(out, run(peer, a))
    assert torch.equal(state, a["state"])  # which the second call changed
    padded = torch.zeros(8, H * P * N + 8)
    padded[:, 8:] = model(2)["state"].flatten(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(peer, {**a, "state": padded[:, 8:].unflatten(1, (H, P, N))})  # a gap behind each slot costs nothing
    assert torch.equal(padded[:, 8:].unflatten(1, (H, P, N)), a["state"])


@pytest.mark.parametrize("peer", [vllm, flashinfer])
@pytest.mark.parametrize("layout", [spread, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)])
def test_an_output_in_any_layout(peer, layout):
    a = model(3)
    expected = run(peer, {**a, "state": a["state"].clone()})
    out = layout(torch.full((3, H, P), float("nan")))
    assert not out.is_contiguous()
    result = peer.selective_state_update(**a, out=out)
    assert result is (out if peer is flashinfer else None)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
)
def test_an_output_of_another_dtype_is_rounded_once(dtype, wanted):
    a = model(3)
    a["x"] = a["x"].to(dtype)
    exact = run(vllm, {**a, "x": a["x"].float(), "state": a["state"].clone()})
    out = torch.full((3, H, P), float("nan"), dtype=wanted)
    vllm.selective_state_update(**a, out=out)
    assert torch.equal(out, exact.to(wanted))


def test_targets_that_overlap_themselves_and_other_dtypes_change_nothing():
    a = model(2)
    kept = a["state"].clone()
    targets = [
        torch.zeros(2, H, 1).expand(2, H, P),
        *(torch.zeros(2, H, P, dtype=d) for d in (torch.int32, torch.double)),
    ]
    for out in targets:
        with pytest.raises(ValueError, match="out: expected"):
            vllm.selective_state_update(**a, out=out)
        assert torch.equal(a["state"], kept)
        assert not out.any()
    out, state = torch.zeros(2, H, P), torch.zeros(8, H, P, 1).expand(8, H, P, N)
    with pytest.raises(ValueError, match="state: expected"):
        vllm.selective_state_update(**{**a, "state": state}, out=out)
    assert not out.any()
    assert not state.any()


def test_a_state_that_is_only_read_is_not_written_either():
    a = model(2)
    state = torch.ones(8, H, P, 1).expand(8, H, P, N)
    version = state._version
    expected = flashinfer.selective_state_update(**{**a, "state": state.contiguous()})
    with pytest.warns(RuntimeWarning, match="state: copied as a whole"):
        out = flashinfer.selective_state_update(**{**a, "state": state}, disable_state_update=True)
    assert torch.equal(out, expected)
    assert state._version == version


def test_rows_of_no_sequence_stay_as_they_are_in_a_copied_output():
    a = model(4)
    out = spread(torch.full((4, H, P), 5.0))
    vllm.selective_state_update(**a, out=out, cu_seqlens=torch.tensor([1, 2, 3], dtype=torch.int32))
    assert (out[[0, 3]] == 5).all()
    assert (out[1:3] != 5).all()


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
@pytest.mark.parametrize("null", [0, 5])
def test_vllm_one_token(name, null):
    a = model(4)
    exact, y = wide(a), torch.zeros(4, H, P, dtype=torch.float64)
    indices, out = torch.tensor([3, null, 1, null], dtype=torch.int32), torch.full((4, H, P), float("nan"))
    vllm_rule(exact, y, [1] * 4, indices[:, None], indices[:, None], None, null)
    order = [a.pop(n) for n in ("state", "x", "dt", "A", "B", "C", "D", "dt_bias", "z")]
    assert vllm.selective_state_update(*order, True, indices, out=out, **{name: null}) is None
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
        num_accepted_tokens=None if accepted is None else torch.cat([accepted, spare[0, :1]]),
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


def test_vllm_rounds_stochastically_but_with_counts():
    a = model(2)
    state, read = a.pop("state").half(), torch.tensor([[3], [1]])
    results = []
    for stochastic in (True, False):
        results.append(state.clone())
        vllm.selective_state_update(
            results[-1],
            **a,
            state_batch_indices=read,
            out=torch.empty(2, H, P),
            num_accepted_tokens=torch.tensor([1, 1]),
            enable_stochastic_rounding=stochastic,
        )
    assert torch.equal(*results)


def test_vllm_rounds_of_the_generator():
    a = model(2)
    state, results = a.pop("state").half(), {}
    for rounds in (0, 10, 3):
        results[rounds] = state.clone()
        torch.manual_seed(4)
        out = torch.empty(2, H, P)
        vllm.selective_state_update(
            results[rounds], **a, out=out, enable_stochastic_rounding=True, cache_philox_rounds=rounds
        )
    assert torch.equal(results[0], results[10])
    assert not torch.equal(results[0], results[3])


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


@pytest.mark.parametrize("cache_steps", [0, 3])
def test_flashinfer_several_tokens_are_an_axis_even_beside_cu_seqlens(cache_steps):
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
def test_flashinfer_counts_beside_one_slot_a_sequence(packed):
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
def test_flashinfer_asks_for_one_dtype(changed, like):
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
