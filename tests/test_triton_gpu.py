"""The triton backend on a GPU, beyond the contract: memory, bits, large caches, graphs, threads, torch.compile."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from modes import bits, to_host, to_mode

import ssu_bridge
from ssu_bridge.backends import reference
from ssu_bridge.cases import Case
from ssu_bridge.check import compare
from ssu_bridge.update import explain

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


@pytest.mark.parametrize("first", [True, False])
def test_in_a_cuda_graph(first):
    case = Case("graph", headdim=32, dstate=64, pad_slot_id=-5 - first)  # a kernel that no other test has loaded
    arrays = case.arrays(seed=4)
    expected = run_torch(case, arrays) if not first else None
    tensors = to_mode(arrays, "torch.cuda")
    start = tensors["state"].clone()
    call = functools.partial(ssu_bridge.update, **tensors, **case.flags, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
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
