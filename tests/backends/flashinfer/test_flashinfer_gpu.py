"""The flashinfer backend on a GPU: as right as the others, and bit for bit what FlashInfer's own function gives."""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import torch
from contract import assert_step
from flashinfer_calls import (
    BARE,
    CASE,
    arrays_of,
    as_flashinfer_wants,
    draw,
    intermediates,
    packed,
    problem_of,
    quantized,
    sized,
    table,
    tensors_of,
    tokens,
)
from modes import GPU_MODES, bits, int64_as_it_is, poisoned, step, to_host, to_mode

import ssu_bridge
from ssu_bridge.backends.flashinfer import backend as flashinfer
from ssu_bridge.backends.flashinfer import module as flashinfer_module
from ssu_bridge.core.slots import require_valid
from ssu_bridge.testing.cases import CASES
from ssu_bridge.testing.check import results_by_name

pytestmark = pytest.mark.gpu


def trusted(case):
    """Whether no index of a case is out of range: FlashInfer looks for its pad alone."""
    try:
        require_valid(problem_of(case), case.arrays(seed=3))
    except ValueError:
        return False
    return True


MIXED = {"state": "bfloat16", "*": "bfloat16", "A": "float32"}
# Headdims that later versions compute right.
WIDE = sized(name="headdim 256", headdim=256, dstate=128, dtypes=MIXED)
SMALL = sized(name="headdim 32", headdim=32, dstate=128, dtypes=MIXED)
LATER = {
    "headdim 256": WIDE,
    "headdim 256, tokens": sized(WIDE, name="headdim 256, tokens", tokens=4),
    "headdim 256, float32": sized(WIDE, name="headdim 256, float32", dtypes={}),
    "headdim 32": SMALL,
    "headdim 32, tokens": sized(SMALL, name="headdim 32, tokens", tokens=4),
    "headdim 80": sized(SMALL, name="headdim 80", headdim=80),
    "headdim 80, int16": sized(SMALL, name="headdim 80, int16", headdim=80, dtypes={**MIXED, "state": "int16"}),
}
LATER = LATER if 256 in flashinfer_module.headdims() else {}
# The contract's cases with sizes that FlashInfer takes.
SIZED = [
    case if case.headdim == 64 else sized(case, headdim=64, dstate=64)
    for case in CASES
    if case.nheads and not case.window
]
# Describing them takes a second, and where there is no GPU nothing runs them.
DESCRIBED = (*SIZED, *LATER.values()) if torch.cuda.is_available() else ()
TAKEN = [case for case in DESCRIBED if flashinfer.refusal(problem_of(case)) is None and trusted(case)]

BRAIN = sized(dstate=128, dtypes=MIXED)
HALF = sized(dstate=128, dtypes={**MIXED, "state": "float16"}, seed=2**40 + 7)
ROOMY = sized(slots=20)
LARGE = sized(sequences=80, slots=81, indices=tuple(range(80, 0, -1)))
OTHER = sized(headdim=128, dstate=96)
BITWISE = {
    "one token": CASE,
    "one token, bare": BARE,
    "one token, bfloat16": BRAIN,
    "one token, state kept": sized(disable_state_update=True),
    "destinations, a pad among them": sized(destinations=(1, -1, 3)),
    "tokens": tokens(),
    "tokens, bfloat16": tokens(BRAIN, 4),
    "tokens, no slots": tokens(BARE),
    "tokens, destinations": tokens(sized(destinations=(1, -1, 3))),
    "tokens, tables and counts": tokens(sized(ROOMY, indices=table(), destinations=table(first=9), accepted=(0, 1, 3))),
    "tokens, intermediate states": tokens(intermediates()),
    "packed": packed(),
    "packed, tables": sized(packed(ROOMY), destinations=table(first=9)),
    "int16": quantized(BRAIN),
    "int16, no slots": quantized(sized(BRAIN, indices=None)),
    "int16, tokens": tokens(quantized(BRAIN), 4),
    "int16, intermediate states": tokens(quantized(intermediates(BRAIN)), 4),
    "rounded stochastically": HALF,
    "rounded stochastically, tokens": tokens(HALF, 4),
    **LATER,
}


@pytest.fixture(scope="module", autouse=True)
def _all_compiled():
    """Compile FlashInfer's modules side by side: each takes its nvcc 25 to 70 s."""
    if reason := flashinfer.missing("jax"):
        pytest.skip(reason)
    modules = {flashinfer._module(problem_of(case)) for case in (*TAKEN, *BITWISE.values(), LARGE, OTHER)}
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(flashinfer_module.load, modules))


def test_there_are_cases():
    assert len(TAKEN) >= 30
    names = {
        "mamba2",
        "pads",
        "destinations, pads in both",
        "tokens",
        "packed, rows of no sequence",
        "int16 state, tokens",
    }
    assert names <= {case.name for case in TAKEN}


@pytest.mark.parametrize("mode", GPU_MODES)
@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_case(case, mode):
    arrays = case.arrays(seed=len(case.name))
    with int64_as_it_is(arrays):
        assert_step(case, arrays, mode, "flashinfer")


def theirs(case, algorithm="auto"):
    """Call FlashInfer's own function; return the results by the names that kernels have for them."""
    from flashinfer.mamba import selective_state_update

    problem, tensors = problem_of(case), tensors_of(draw(case), "torch.cuda")
    tensors["out"] = poisoned(tensors["x"])
    tensors.setdefault("D", torch.zeros(problem.nheads, device="cuda", dtype=tensors["dt"].dtype))
    by_token = flashinfer._by_token(problem)
    views = as_flashinfer_wants(tensors, one_token_axis=by_token and problem.layout == "single")
    views["out"] = views.pop("output")
    if by_token:
        views["cache_steps"] = case.steps or flashinfer._longest(problem)
    if "rand_seed" in tensors:
        views["rand_seed"] = views["rand_seed"].reshape(1)
    if "intermediate_state_scales" in tensors:
        views["intermediate_state_scales"] = views["intermediate_state_scales"][: case.sequences]
    given = {name: value for name, value in views.items() if value is not None and name != "algorithm"}
    selective_state_update(**given, **case.flags, algorithm=algorithm)
    return to_host({name: tensors[name] for name in ("out", *flashinfer_results(tensors))}, "torch.cuda")


def flashinfer_results(tensors):
    written = ("state", "state_scale", "intermediate_states", "intermediate_state_scales")
    return [name for name in written if name in tensors]


def ours(case, mode, **config):
    """Call ``update`` in a mode; return the results in the same way."""
    with ssu_bridge.using(**config):
        results = step(mode, to_mode(case.arrays(seed=3), mode), **case.flags, backend="flashinfer")
    return to_host(results_by_name(results), mode)


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(bits(got[name]), bits(array), err_msg=name)


@pytest.mark.parametrize("mode", GPU_MODES)
@pytest.mark.parametrize("name", BITWISE)
def test_bits_are_flashinfers_own(name, mode):
    expected = theirs(BITWISE[name])
    assert np.isfinite(expected["out"].astype("float32")).all()
    assert_same_bits(ours(BITWISE[name], mode), expected)


@pytest.mark.parametrize("algorithm", ["auto", "simple", "vertical", "horizontal"])
@pytest.mark.parametrize("mode", ["torch.cuda", "jax.jit"])
def test_bits_of_each_algorithm(algorithm, mode):
    for case in (CASE, LARGE):
        assert_same_bits(ours(case, mode, algorithm=algorithm), theirs(case, algorithm))


def test_other_sizes():
    assert_same_bits(ours(OTHER, "torch.cuda"), theirs(OTHER))


def test_tensors_that_bulk_copies_cannot_read():
    """FlashInfer's own choice at this batch raises for them; here the simple kernel is taken."""
    tensors = tensors_of(draw(LARGE), "torch.cuda")
    update = functools.partial(ssu_bridge.update, **LARGE.flags, backend="flashinfer")
    expected = update(**{**tensors, "state": tensors["state"].clone()}, algorithm="simple")
    x = tensors["x"]
    tensors["x"] = torch.empty(x.numel() + 4, device="cuda")[4:].view(x.shape).copy_(x)
    for got, its in zip(update(**tensors), expected, strict=True):
        assert torch.equal(got, its)


@pytest.mark.parametrize("name", ["x", "z"])
@pytest.mark.parametrize("case", [CASE, LARGE, tokens()], ids=["simple", "vertical", "tokens"])
def test_the_output_may_be_written_over_x_or_z(case, name):
    expected = ours(case, "torch.cuda")
    tensors = tensors_of(draw(case), "torch.cuda")
    out, state = ssu_bridge.update(**tensors, out=tensors[name], **case.flags, backend="flashinfer")
    assert out is tensors[name]
    assert_same_bits(to_host({"out": out, "state": state}, "torch.cuda"), expected)


def test_a_refused_call_changes_nothing():
    tensors = tensors_of(draw(sized(slots=2, indices=(0, 1, -1))), "torch.cuda")
    before = tensors["state"].clone()
    with pytest.raises(ssu_bridge.UnsupportedError, match="as many slots as sequences.*supported by .*'triton'"):
        ssu_bridge.update(**tensors, backend="flashinfer")
    assert torch.equal(tensors["state"], before)


def test_nothing_to_do_leaves_no_error_behind():
    tensors = tensors_of(draw(sized(sequences=0, indices=())), "torch.cuda")
    out, _ = ssu_bridge.update(**tensors, backend="flashinfer")
    torch.cuda.synchronize()
    assert out.shape == (0, 4, 64)


def test_in_a_cuda_graph():
    tensors = tensors_of(draw(), "torch.cuda")
    start = tensors["state"].clone()
    call = functools.partial(ssu_bridge.update, **tensors, **CASE.flags, backend="flashinfer")
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out, _ = call()
    for _ in range(2):
        tensors["state"].copy_(start)
        graph.replay()
    assert_same_bits(to_host({"out": out, "state": tensors["state"]}, "torch.cuda"), theirs(CASE))


def test_a_donated_jit_needs_no_temporary_memory():
    arrays = to_mode(arrays_of(draw(LARGE)), "jax")
    jitted = jax.jit(functools.partial(ssu_bridge.update, backend="flashinfer"), donate_argnames="state")
    memory = jitted.lower(**arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes == 0
    assert memory.alias_size_in_bytes == arrays["state"].nbytes


def test_softplus_below_minus_17_is_nothing():
    """Where FlashInfer's arithmetic differs from the other backends'; docs/flashinfer.md says so."""
    call = draw(BARE) | {"dt": np.full((3, 4), -20, "float32"), "state": np.zeros((6, 4, 64, 64), "float32")}
    for backend, some in (("flashinfer", False), ("triton", True)):
        tensors = tensors_of(call, "torch.cuda")
        ssu_bridge.update(**tensors, dt_softplus=True, backend=backend)
        assert bool(tensors["state"].any()) == some


@pytest.mark.parametrize(
    "case", [CASE, tokens(), quantized(), HALF], ids=["one token", "tokens", "int16", "stochastic"]
)
def test_check_passes_on_it(case):
    report = ssu_bridge.check(**to_mode(case.arrays(seed=5), "torch.cuda"), **case.flags, backend="flashinfer")
    assert report, str(report)
