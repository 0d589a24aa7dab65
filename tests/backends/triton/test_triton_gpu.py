"""The triton backend on a GPU, beyond the contract: memory, bits, large caches, graphs, threads, torch.compile."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import triton
import triton.language as tl
from modes import bits, to_host, to_mode

import ssu_bridge
from ssu_bridge.api import explain
from ssu_bridge.backends import reference
from ssu_bridge.backends.triton.kernels.rounding import _inverse
from ssu_bridge.core import rounding
from ssu_bridge.core.quantized import paired, unpaired
from ssu_bridge.core.slots import routes
from ssu_bridge.testing.cases import Case
from ssu_bridge.testing.check import compare

pytestmark = pytest.mark.gpu

DTYPES = ("float32", "bfloat16", "float16")


def decode(sequences, dtype="bfloat16", **changes):
    """A step of a large model; every sequence has the same arguments whatever the batch, up to ``one_of``."""
    slots = tuple(range(sequences))
    fields = {"slots": sequences, "nheads": 64, "headdim": 64, "dstate": 128, "ngroups": 8, "indices": slots, **changes}
    others = {"*": "bfloat16", "A": "float32"} if dtype == "bfloat16" else {}
    return Case("decode", sequences=sequences, dtypes={"state": dtype, **others}, **fields)


def repeated(case, times):
    """The arrays of a case with one sequence, for a batch of the same sequence over and over, each with its slot."""
    arrays = case.arrays(seed=5)
    batched = {"state", "x", "dt", "B", "C", "z"}
    result = {n: np.repeat(a, times, axis=0) if n in batched else a for n, a in arrays.items()}
    return {**result, "state_batch_indices": np.arange(times, dtype="int32")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("untied", [(), ("A", "dt", "D", "dt_bias")])
def test_bits_depend_on_neither_batch_nor_framework(dtype, untied):
    case = decode(1, dtype, untied=untied, nheads=16)
    out, state = to_host(dict(zip("os", run_torch(case, case.arrays(seed=5)), strict=True)), "torch").values()
    for times in (1, 3, 16, 300):
        arrays = repeated(case, times)
        for runner, mode in ((run_torch, "torch"), (run_jax, "jax")):
            outs, states = to_host(dict(zip("os", runner(case, arrays), strict=True)), mode).values()
            for i in range(times):
                np.testing.assert_array_equal(bits(outs[i]), bits(out[0]))
                np.testing.assert_array_equal(bits(states[i]), bits(state[0]))


@triton.jit
def inverses(scales, results, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(results + at, _inverse(tl.load(scales + at)))


# Of numbers and of inverses that are subnormal, of the smallest and the largest that a few steps are right for, and others.
@pytest.mark.parametrize("exponent", [0, 1, 2, 127, 200, 251, 252, 253, 254])
def test_inverses_of_scales_are_ieee(exponent):
    """For every mantissa, alone and beside others that are not like it."""
    numbers = (np.arange(2**23, dtype="uint32") | np.uint32(exponent << 23)).view("float32")
    for scales in (numbers, np.where(np.arange(2**23) % 32 == 5, np.float32(1e-45), numbers)):
        given = torch.from_numpy(scales).cuda()
        found = torch.empty_like(given)
        inverses[(2**23 // 1024,)](given, found, 1024)
        with np.errstate(divide="ignore", over="ignore"):
            np.testing.assert_array_equal(bits(found.cpu().numpy()), bits(np.float32(1) / scales))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_tile(dtype):
    case = decode(2, dtype)
    arrays, results = case.arrays(seed=6), []
    for tile in (None, (16, 8), (64, 4), (8, 1), (32, 2), (128, 4)):
        with ssu_bridge.using(triton_tile=tile):
            results.append(run_torch(case, arrays))
    for got in results[1:]:
        for mine, first in zip(got, results[0], strict=True):
            assert torch.equal(mine, first)


def run_torch(case, arrays):
    return ssu_bridge.update(**to_mode(arrays, "torch.cuda"), **case.flags, backend="triton")


def run_jax(case, arrays):
    return ssu_bridge.update(**to_mode(arrays, "jax"), **case.flags, backend="triton")


def test_a_donated_jit_needs_no_temporary_memory():
    case = decode(16)
    arrays = to_mode(case.arrays(seed=1), "jax")
    jitted = jax.jit(functools.partial(ssu_bridge.update, **case.flags, backend="triton"), donate_argnames="state")
    memory = jitted.lower(**arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes == 0
    assert memory.alias_size_in_bytes == arrays["state"].nbytes


def test_a_donated_scan_copies_no_state():
    case = decode(16)
    arrays = to_mode(case.arrays(seed=1), "jax")
    state = arrays.pop("state")

    @functools.partial(jax.jit, donate_argnums=0)
    def loop(state, rest):
        step = functools.partial(ssu_bridge.update, **rest, **case.flags, backend="triton")
        return jax.lax.scan(lambda s, _: step(s)[::-1], state, None, length=4)

    memory = loop.lower(state, arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < state.nbytes // 8


def test_a_cache_of_more_than_2_to_the_31_elements():
    slots, shape = 4200, (64, 64, 128)  # 2.2e9 elements
    case = decode(2, indices=(slots - 1, 1), slots=3)
    arrays = case.arrays(seed=2)
    small = {**arrays, "state_batch_indices": np.array([2, 1], "int32")}
    expected = run_torch(case, small)
    tensors = to_mode({n: a for n, a in arrays.items() if n != "state"}, "torch.cuda")
    given = to_mode(small, "torch.cuda")["state"]
    state = torch.zeros((slots, *shape), dtype=torch.bfloat16, device="cuda")
    state[slots - 1], state[1] = given[2], given[1]
    out, _ = ssu_bridge.update(state, **tensors, **case.flags, backend="triton")
    assert torch.equal(out, expected[0])
    assert torch.equal(state[slots - 1], expected[1][2])
    assert torch.equal(state[1], expected[1][1])
    assert not state[[0, 2, 3, 4096, slots - 2]].any()


def test_strided_and_unaligned_tensors():
    case = Case("strided", headdim=16, dstate=32)
    arrays = case.arrays(seed=3)
    expected = run_torch(case, arrays)
    for gap in (8, 7):
        for first in (0, 1):
            tensors = {
                name: spread(t, gap, first) if name in ("state", "x", "B", "C", "z", "dt") else t
                for name, t in to_mode(arrays, "torch.cuda").items()
            }
            out = spread(torch.full_like(tensors["x"], float("nan")), gap, first)
            got = ssu_bridge.update(**tensors, **case.flags, out=out, backend="triton")
            for mine, theirs in zip(got, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def spread(tensor, gap, first):
    """Copy a tensor into memory with a gap behind each entry of its first axis, ``first`` elements from an alignment."""
    width = tensor[0].numel()
    whole = torch.zeros(first + len(tensor) * (width + gap), dtype=tensor.dtype, device=tensor.device)
    view = whole[first:].view(len(tensor), width + gap)[:, :width].view(tensor.shape)
    return view.copy_(tensor)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "bfloat16"])
@pytest.mark.parametrize("unaligned", ["state", "intermediate_states"])
@pytest.mark.parametrize("tokens", [None, 2])
def test_a_state_is_stored_where_one_place_is_unaligned(tokens, unaligned, dtype):
    case = Case("", headdim=32, dstate=64, tokens=tokens, steps=tokens or 1, entries=(2, 0, 1), dtypes={"state": dtype})
    arrays = case.arrays(seed=6)

    def run(place):
        given = to_mode(arrays, "torch.cuda")
        given[unaligned] = place(given[unaligned])
        results = ssu_bridge.update(**given, **case.flags, backend="triton", algorithm="loop")
        return [
            t for result in results for t in (result if isinstance(result, ssu_bridge.QuantizedState) else (result,))
        ]

    def moved(stored):
        if isinstance(stored, ssu_bridge.QuantizedState):
            return ssu_bridge.QuantizedState(spread(stored.values, 0, 1), stored.scale)
        return spread(stored, 0, 1)

    (out, *stored), (expected, *right) = run(moved), run(lambda stored: stored)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)  # added up in another order
    for got, expected in zip(stored, right, strict=True):
        assert torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("first", [True, False])
def test_in_a_cuda_graph(first):
    case = Case("graph", headdim=32, dstate=64, pad_slot_id=-5 - first)  # a kernel that no other test has loaded
    arrays = case.arrays(seed=4)
    expected = run_torch(case, arrays) if not first else None
    tensors = to_mode(arrays, "torch.cuda")
    start = tensors["state"].clone()
    call = functools.partial(ssu_bridge.update, **tensors, **case.flags, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out, _ = call()
    for _ in range(2):
        tensors["state"].copy_(start)
        graph.replay()
    expected = expected or run_torch(case, arrays)
    assert torch.equal(out, expected[0])
    assert torch.equal(tensors["state"], expected[1])


def test_from_many_threads_at_once():
    case = Case("threads", headdim=32, dstate=64, pad_slot_id=-9)
    arrays = case.arrays(seed=4)
    results, errors = [], []

    def work():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                results.append([t.cpu() for t in run_torch(case, arrays)])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for got in results[1:]:
        assert all(map(torch.equal, got, results[0]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has one GPU")
def test_on_a_second_gpu():
    case = decode(2)
    arrays = case.arrays(seed=4)
    expected = run_torch(case, arrays)
    tensors = {name: tensor.to("cuda:1") for name, tensor in to_mode(arrays, "torch.cuda").items()}
    for got, first in zip(ssu_bridge.update(**tensors, **case.flags, backend="triton"), expected, strict=True):
        assert torch.equal(got.cpu(), first.cpu())


def test_special_values_and_extremes():
    """NaN stays NaN, and large arguments of softplus and the gate make none."""
    case = Case("special", sequences=1, slots=1, nheads=8, headdim=16, dstate=32, indices=(0,))
    arrays = case.arrays(seed=7)
    arrays["dt"] = np.array([[-103, -87, -50, -17, 20, 88, 200, np.nan]], "float32")
    arrays["dt_bias"][:] = 0
    arrays["z"][0, 0] = np.linspace(-1e30, 1e30, 16)
    out, state = to_host(dict(zip("os", run_torch(case, arrays), strict=True)), "torch").values()
    assert np.isnan(out[0, 7]).all()
    assert np.isnan(state[0, 7]).all()
    arrays["dt"][0, 7] = 0
    out, state = to_host(dict(zip("os", run_torch(case, arrays), strict=True)), "torch").values()
    problem = explain(**to_mode(arrays, "torch.cuda"), **case.flags).choices[0].problem
    rows = compare(reference.compute(problem, arrays), arrays, {"out": out, "state": state})
    assert all(row.passed for row in rows), rows


def test_state_is_rounded_to_nearest_even():
    rng = np.random.default_rng(8)
    value = rng.integers(0, 2**32, 4096, np.uint32).view(np.float32)
    value[2048:] = (rng.integers(0, 2**15, 2048).astype(np.uint32) << 16 | 0x8000).view(np.float32)  # ties
    value = np.where(np.isfinite(value), value, 1).astype("float32").reshape(1, 32, 128)
    one = torch.ones(1, 1, 1, device="cuda")
    for dtype in (torch.bfloat16, torch.float16):
        state = torch.zeros(32, 1, 1, 128, dtype=dtype, device="cuda")
        B = torch.from_numpy(value).cuda().view(32, 1, 128)
        ones = one.expand(32, 1, 1).contiguous()
        ssu_bridge.update(state, ones, ones[..., 0], -one[0, 0], B, torch.zeros_like(B), backend="triton")
        assert torch.equal(state.view(32, 128), B.view(32, 128).to(dtype))


def test_jax_without_torch_tensors_shares_the_kernel():
    case = decode(3)
    arrays = case.arrays(seed=9)
    out, state = run_jax(case, arrays)
    torch_out, torch_state = run_torch(case, arrays)
    assert jnp.array_equal(out, jnp.from_dlpack(torch_out))
    assert jnp.array_equal(state, jnp.from_dlpack(torch_state))


# --- Many tokens ---

BY_TOKEN = ("x", "dt", "B", "C", "z")


@pytest.mark.parametrize("untied", [(), ("A", "dt", "D", "dt_bias")], ids=["tied", "untied"])
@pytest.mark.parametrize("shape", [(64, 128), (64, 96), (128, 256), (7, 19), (48, 16)])
def test_many_tokens_are_the_same_as_one_at_a_time(shape, untied):
    case = Case("tokens", tokens=5, headdim=shape[0], dstate=shape[1], untied=untied)
    arrays = case.arrays(seed=3)
    together = run_torch(case, arrays)
    outs, tensors = [], to_mode(arrays, "torch.cuda")
    for token in range(case.tokens):
        one = {name: tensor[:, token] if name in BY_TOKEN else tensor for name, tensor in tensors.items()}
        outs.append(ssu_bridge.update(**one, **case.flags, backend="triton")[0])
    assert torch.equal(torch.stack(outs, 1), together[0])
    assert torch.equal(tensors["state"], together[1])


def test_packed_tokens_are_the_same_as_those_on_an_axis():
    case = Case("packed", tokens=12, cu_seqlens=(0, 4, 8, 12), headdim=64, dstate=128)
    arrays = case.arrays(seed=3)
    alike = {name: a.reshape(3, 4, *a.shape[1:]) if name in BY_TOKEN else a for name, a in arrays.items()}
    del alike["cu_seqlens"]
    packed, on_an_axis = run_torch(case, arrays), run_torch(case, alike)
    assert torch.equal(packed[0], on_an_axis[0].view_as(packed[0]))
    assert torch.equal(packed[1], on_an_axis[1])


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_tokens_that_are_slices_of_one_projection(dtype, shift):
    case = Case("slices", tokens=4, steps=5, dtypes={"state": dtype}, headdim=32, dstate=64)
    arrays = case.arrays(seed=3)
    expected = named_results(run_torch(case, arrays))
    tensors = unpaired(to_mode(arrays, "torch.cuda"))
    flat = {name: tensors[name].flatten(2) for name in ("x", "B", "C", "z")}
    padding = torch.zeros(3, 4, 4 + shift, device="cuda")
    pieces = torch.cat([padding, *flat.values()], -1).split([4 + shift, *(t.shape[-1] for t in flat.values())], -1)
    tensors |= {
        name: piece.unflatten(-1, tensors[name].shape[2:]) for name, piece in zip(flat, pieces[1:], strict=True)
    }
    written = ("state", "intermediate_states", "state_scale", "intermediate_state_scales")
    tensors |= {name: spread(tensors[name], 16, shift) for name in written if name in tensors}
    got = named_results(ssu_bridge.update(**paired(tensors), **case.flags, backend="triton"))
    for name, array in expected.items():
        if array.dtype.kind == "i":
            np.testing.assert_array_equal(got[name], array)
        else:
            np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{"tokens": 3, "steps": 3}, {"tokens": 2, "seed": 11}, {}], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "int16", "int8", "float8_e4m3fn"])
def test_bits_of_stored_states_depend_on_neither_tile_nor_batch(dtype, changes):
    if dtype == "int16" and "seed" in changes:
        pytest.skip("int16 is not rounded stochastically")
    case = decode(3, dtype, nheads=8, **changes)
    arrays, results = case.arrays(seed=6), []
    for tile in (None, (32, 8), (64, 4), (16, 1), (32, 2)):
        with ssu_bridge.using(triton_tile=tile):
            results.append(named_results(run_torch(case, arrays)))
    lone = {n: a[:1] if n in (*BY_TOKEN, "state_batch_indices") else a for n, a in arrays.items()}
    for name, first in results[0].items():
        for got in results[1:]:
            np.testing.assert_array_equal(bits(got[name]), bits(first))
    alone = named_results(run_torch(case, lone))
    for name, got in alone.items():
        np.testing.assert_array_equal(bits(got[:1]), bits(results[0][name][:1]))


def named_results(results):
    return to_host(dict(zip(("out", "state", "intermediate_states"), results, strict=False)), "torch")


KEY = 0x0123456789ABCDEF


@pytest.mark.parametrize("shape", [(32, 128), (7, 19), (3, 1)])
@pytest.mark.parametrize("rounds", [10, 3])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_floats_are_rounded_stochastically_to_the_bit(dtype, rounds, shape):
    """States that are exactly B: old ones of zero, and one for everything else."""
    slots, (headdim, dstate) = 40, shape
    rng = np.random.default_rng(5)
    B = rng.integers(0, 2**32, (slots, 1, dstate), np.uint32).view(np.float32)
    B = np.where(np.isnan(B), np.float32("nan"), B)  # none that NumPy would warn of
    B[::3] = rng.standard_normal(B[::3].shape) * 10.0 ** rng.integers(-9, 6, B[::3].shape)
    B[1::3, :, 0] = [[np.inf], [-np.inf], [np.nan], [65519.996], [-65520], [3.4e38], [2.0**-25], [1e-45]] + [[1]] * 5
    state = torch.zeros(slots, 2, headdim, dstate, dtype=getattr(torch, dtype), device="cuda")
    one, tensor = torch.ones(slots, 2, headdim, device="cuda"), torch.from_numpy(B).cuda()
    with ssu_bridge.using(philox_rounds=rounds):
        parameters = one[..., 0].contiguous(), -one[0, :, 0], tensor, torch.zeros_like(tensor)
        ssu_bridge.update(state, one, *parameters, rand_seed=KEY, backend="triton")
    got = to_host({"state": state}, "torch")["state"]
    for slot in range(slots):
        values = np.broadcast_to(B[slot] + np.float32(0), got.shape[1:])  # 0 * decay + B makes 0 of -0
        words = rounding.slot_words(slot, values.shape, 0, 0, (KEY & 0xFFFFFFFF, KEY >> 32), rounds)
        expected = rounding.rounded(values, dtype, words)
        same = (bits(got[slot]) == bits(expected)) | (np.isnan(values) & np.isnan(got[slot].astype("float32")))
        assert same.all(), (slot, values[~same][:5], got[slot][~same][:5], expected[~same][:5])


@pytest.mark.parametrize("rounded", [True, False], ids=["stochastic", "nearest"])
@pytest.mark.parametrize("dtype", ["int16", "int8", "float8_e4m3fn"])
def test_rows_are_quantised_to_the_bit(dtype, rounded):
    """Rows that are exactly B again: of every size, tiny ones too, with a NaN, an infinity, nothing but zeros."""
    if rounded and dtype == "int16":
        pytest.skip("int16 is not rounded stochastically")
    slots, dstate = 64, 128
    rng = np.random.default_rng(5)
    B = (rng.standard_normal((slots, 1, dstate)) * 10.0 ** rng.uniform(-39, 30, (slots, 1, 1))).astype("float32")
    B[1], B[2, 0, 3], B[3, 0, 4], B[4] = 0, np.nan, np.inf, 1e-37
    B[5:16] *= 2.0 ** -rng.integers(0, 12, (11, 1, dstate)).astype("float32")
    B[-len(tiny.SCALES) :, 0] = tiny.rows(dtype, dstate)
    values = torch.zeros(slots, 1, 1, dstate, dtype=getattr(torch, dtype), device="cuda")
    state = ssu_bridge.QuantizedState(values, torch.ones(slots, 1, 1, device="cuda"))
    one, tensor = torch.ones(slots, 1, 1, device="cuda"), torch.from_numpy(B).cuda()
    seed = {"rand_seed": KEY} if rounded else {}
    ssu_bridge.update(
        state, one, one[..., 0].contiguous(), -one[0, :, 0], tensor, torch.zeros_like(tensor), **seed, backend="triton"
    )
    got = to_host(unpaired({"state": state}), "torch")
    scaled, scales = rounding.scale_rows(np, B + np.float32(0), dtype)
    words = [rounding.slot_words(i, (1, 1, dstate), 0, 0, (KEY & 0xFFFFFFFF, KEY >> 32), 10)[0] for i in range(slots)]
    expected = rounding.rounded(scaled, dtype, np.array(words) if rounded else None)
    np.testing.assert_array_equal(got["state_scale"][:, 0], scales)
    np.testing.assert_array_equal(scales[-len(tiny.SCALES) :, 0], tiny.stored_scales(dtype))
    wide = got["state"][:, 0].astype("float32"), expected.astype("float32")
    np.testing.assert_array_equal(*wide)
    assert (bits(got["state"][:, 0]) == bits(expected))[~np.isnan(wide[1])].all()


def test_random_words_of_elements_beyond_2_to_the_34():
    """The number of a Philox block takes more than 32 bits there."""
    shape, slot = (64, 64, 128), 2**15 + 1
    rng = np.random.default_rng(5)
    B = rng.standard_normal((1, 1, 128)).astype("float32")
    values = torch.empty(slot + 1, *shape, dtype=torch.int8, device="cuda")
    scale = torch.ones(slot + 1, *shape[:2], device="cuda")
    values[slot] = 0
    one, tensor = torch.ones(1, *shape[:2], device="cuda"), torch.from_numpy(B).cuda()
    parameters = one[..., 0].contiguous(), -one[0, :, 0], tensor, torch.zeros_like(tensor)
    index = torch.tensor([slot], device="cuda")
    state = ssu_bridge.QuantizedState(values, scale)
    ssu_bridge.update(state, one, *parameters, state_batch_indices=index, rand_seed=KEY, backend="triton")
    scaled, _ = rounding.scale_rows(np, np.broadcast_to(B[0], shape), "int8")
    words = rounding.slot_words(slot, shape, 0, 0, (KEY & 0xFFFFFFFF, KEY >> 32), 10)
    np.testing.assert_array_equal(values[slot].cpu().numpy(), rounding.rounded(scaled, "int8", words))


# In 64 bits and in 32: values at the ends of the range and beyond the slots. No two name one slot.
WILD = {
    "int32": [(-(2**31), 2**31 - 1, 3), (-1, 6, 2**30), (0, 2, 2**31 - 2), (5, -(2**31) + 1, 7)],
    "int64": [(-(2**63), 2**63 - 1, 3), (2**32, 2**33 + 1, -(2**32)), (2**62, 5, 6), (0, 2**63 - 2, 4)],
}
WILD_FORMS = {
    "one token": lambda wild, table: {"indices": wild, "destinations": wild},
    "tokens": lambda wild, table: {"tokens": 2, "indices": table, "destinations": table, "accepted": wild},
    "intermediates": lambda wild, table: {"tokens": 2, "indices": (4, 1, 0), "steps": 2, "entries": wild},
    "packed": lambda wild, table: {
        "tokens": 5,
        "cu_seqlens": (0, *wild),
        "indices": table,
        "destinations": table,
        "accepted": wild,
    },
    "packed, intermediates": lambda wild, table: {"tokens": 5, "cu_seqlens": (0, *wild), "steps": 2, "entries": wild},
}


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("form", WILD_FORMS)
@pytest.mark.parametrize("kind", WILD)
def test_tables_with_anything_in_them(kind, form, dtype):
    tables = ("state_batch_indices", "dst_state_batch_indices", "num_accepted_tokens", "cu_seqlens")
    kinds = dict.fromkeys((*tables, "intermediate_state_indices"), kind)
    for wild in WILD[kind]:
        changes = WILD_FORMS[form](wild, tuple((value, -9 - i) for i, value in enumerate(wild)))
        case = Case("wild", dtypes={"state": dtype, **kinds}, seed=3 if dtype == "int8" else None, **changes)
        arrays = case.arrays(seed=1)
        before = {**arrays, "out": np.full_like(arrays["x"], np.nan)}
        tensors = to_mode(before, "torch.cuda")
        problem = explain(**tensors, **case.flags).choices[0].problem
        after = named_results(ssu_bridge.update(**tensors, **case.flags, backend="triton"))
        rows = compare(reference.compute(problem, arrays), before, after)
        # Where two sequences have a row in common, its output is whichever's came last.
        plan = routes(problem, arrays)
        apart = plan.lengths.sum() <= problem.tokens if problem.layout == "packed" else True
        assert all(row.passed for row in rows if apart or row.name != "out"), (wild, rows)


@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 2.0**-16, 2.0**-24])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "float8_e4m3fn"])
def test_stochastic_rounding_is_unbiased(dtype, magnitude):
    """The mean error of 2**22 elements is within four standard errors of zero, and numbers of the dtype stay."""
    shape = (32, 1024, 128)
    rng = np.random.default_rng(1)
    B = (rng.uniform(-1, 1, (shape[0], 1, shape[2])) * magnitude).astype("float32")
    B[:, :, 0] = 1  # the scale of a quantised row
    one, tensor = torch.ones(*shape[:2], 1, device="cuda"), torch.from_numpy(B).cuda()
    state = torch.zeros(shape[0], shape[1], 1, shape[2], dtype=getattr(torch, dtype), device="cuda")
    if dtype in rounding.LARGEST:
        state = ssu_bridge.QuantizedState(state, torch.ones(*shape[:2], 1, device="cuda"))
    parameters = one[..., 0], -one[0, :, 0], tensor, torch.zeros_like(tensor)
    ssu_bridge.update(state, one, *parameters, rand_seed=KEY, backend="triton")
    got = to_host(unpaired({"state": state}), "torch")["state"][:, :, 0].astype("float64")
    exact = rounding.scale_rows(np, B, dtype)[0] if dtype in rounding.LARGEST else B
    lo, hi = (
        rounding.rounded(exact, dtype, np.full(B.shape, word, np.uint32)).astype("float64") for word in (2**32 - 1, 0)
    )
    exact = exact.astype("float64")
    assert ((got == lo) | (got == hi)).all()
    assert (got == exact)[np.broadcast_to(exact == lo, got.shape)].all()
    variance = ((exact - lo) * (hi - exact)).sum() * shape[1]
    assert abs((got - exact).sum()) <= 4 * np.sqrt(variance)
