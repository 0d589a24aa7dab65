"""Replay on the flashinfer backend on a GPU: as right as its products in bfloat16 are, and FlashInfer's own bits."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import tvm_ffi
from contract import assert_step
from flashinfer_calls import (
    BRAIN,
    REPLAY,
    REPLAY_PACKED,
    REPLAY_TOKENS,
    as_checkpointing_wants,
    problem_of,
    quantized,
    sized,
    tensors_of,
    without_nan,
)
from modes import GPU_MODES, bits, poisoned, step, to_host, to_mode
from replays import Config, serve

import ssu_bridge
from ssu_bridge.backends.flashinfer import backend as flashinfer
from ssu_bridge.backends.flashinfer import kernel, module, replay
from ssu_bridge.config import Backend
from ssu_bridge.core.slots import require_valid
from ssu_bridge.testing.cases import CASES
from ssu_bridge.testing.check import judge, results_by_name

pytestmark = pytest.mark.gpu

NAMES = dict(zip(module.REPLAY_ARGUMENTS.split(", "), module.REPLAY_PARAMETERS, strict=True))


def fitted(case):
    """The case with sizes, inputs and a cursor that checkpointing_ssu takes: of as many tokens as there are."""
    most = case.most if case.cu_seqlens is not None else case.tokens or 1
    length = case.window + most
    dtypes = {"state": case.dtypes.get("state", "float32"), **BRAIN}
    cursor = {"starts": tuple(s % length for s in case.starts), "pending": tuple(np.clip(case.pending, 0, case.window))}
    dstate = 128 if np.dtype(dtypes["state"]).itemsize == 1 else 64
    return sized(case, headdim=64, dstate=dstate, most=most, dtypes=dtypes, **cursor)


def trusted(case):
    """Whether no index or length is out of range: FlashInfer looks for its pad alone."""
    longest = max(np.diff(case.cu_seqlens), default=0) if case.cu_seqlens is not None else 0
    try:
        require_valid(problem_of(case), case.arrays(seed=3))
    except ValueError:
        return False
    return longest <= case.most


# Describing them takes a while, and where there is no GPU nothing runs them.
DESCRIBED = CASES if torch.cuda.is_available() else ()
CONTRACT = [fitted(case) for case in DESCRIBED if case.window and "wild" not in case.name]
CONTRACT = [case for case in CONTRACT if flashinfer.refusal(problem_of(case)) is None and trusted(case)]


def typed(case, **dtypes):
    return sized(case, dtypes={**case.dtypes, **dtypes})


BITWISE = {
    "one token": REPLAY,
    "tokens": REPLAY_TOKENS,
    "packed": REPLAY_PACKED,
    "pads": sized(REPLAY_TOKENS, indices=(-1, 2, -1)),
    "pads, packed": sized(REPLAY_PACKED, indices=(4, -1, 0)),
    "no slots": sized(REPLAY_TOKENS, indices=None, sequences=6),
    "float32": typed(REPLAY_TOKENS, state="float32"),
    "int8": quantized(REPLAY_TOKENS, "int8"),
    "float8": quantized(REPLAY_PACKED, "float8_e4m3fn"),
    "int8, stochastic": sized(quantized(REPLAY_TOKENS, "int8"), seed=2**40 + 7),
    "float8, stochastic": sized(quantized(REPLAY, "float8_e4m3fn"), seed=2**40 + 7),
    "float16, stochastic": sized(typed(REPLAY_TOKENS, state="float16"), seed=2**40 + 7),
    "dstate 128": sized(REPLAY_TOKENS, dstate=128),
    "dstate 192": sized(REPLAY, dstate=192),
    "dstate 256": typed(sized(REPLAY, dstate=256), state="float32"),
    "float8, dstate 256": quantized(sized(REPLAY, dstate=256), "float8_e4m3fn"),
    "five heads in a group": sized(REPLAY, nheads=5, ngroups=1),
}
# The others need modules of their own.
DAILY = ("one token", "tokens", "packed", "pads", "pads, packed", "no slots", "float32", "int8", "float8, stochastic")
SIZES = {"nheads": 4, "ngroups": 2, "headdim": 64, "dstate": 64, "dtype": "bfloat16"}
# Outputs are sums of some hundred products of numbers with eight bits.
SERVERS = {
    "one token": Config(5, 1, "single", **SIZES, tolerance=0.1, unused=1.5),
    "tokens": Config(5, 3, "multi", **SIZES, state_dtype="float32", tolerance=0.1, unused=1.5),
    "packed": Config(5, 3, "packed", **SIZES, state_dtype="float32", tolerance=0.1, unused=1.5),
}


def module_of(name):
    """What FlashInfer compiles for a test of this name or case; None for a server, which shares that of others."""
    case = name if not isinstance(name, str) else BITWISE.get(name)
    return None if case is None else replay.module_of(problem_of(case))


@pytest.fixture(scope="module", autouse=True)
def _compiled(request):
    """Compile what the selected tests need side by side: each module takes nvcc about a minute."""
    if reason := flashinfer.missing("jax") or module.lacks_replay():
        pytest.skip(reason)
    here = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    modules = {module_of(params[key]) for params in here for key in ("case", "name") if key in params} - {None}
    with ThreadPoolExecutor(17) as pool:
        loads = [pool.submit(module.load_pads), *(pool.submit(module.load, asked) for asked in modules)]
    for load in loads:  # what fails here, fails in its test
        load.exception()


def by_names(names):
    """Mark those nightly that need a module of their own."""
    return [pytest.param(name, marks=[pytest.mark.nightly] * (name not in DAILY)) for name in names]


def test_there_are_cases():
    assert len(CONTRACT) >= 12
    names = {"replay", "replay, tokens", "replay, packed", "replay, int8 state", "replay, odd sizes"}
    assert names <= {case.name for case in CONTRACT}


@pytest.mark.parametrize("mode", GPU_MODES)
@pytest.mark.parametrize("name", by_names(BITWISE))
def test_bits_are_flashinfers_own(name, mode):
    case = BITWISE[name]
    expected, own = theirs(case)
    got = ours(case, mode)
    assert got.keys() == expected.keys()
    for array in expected:
        rows = own if array == "out" else ...
        np.testing.assert_array_equal(bits(got[array])[rows], bits(expected[array])[rows], err_msg=array)
    assert np.isfinite(got["out"].astype("float32")).all()


def theirs(case):
    """Call FlashInfer's own function; return the results by our names, and which rows of out it computes."""
    from flashinfer.mamba.checkpointing_ssu import checkpointing_ssu

    problem = problem_of(case)
    tensors = tensors_of(without_nan(case.arrays(seed=3)), "torch.cuda")
    tensors["out"] = poisoned(tensors["x"])
    views = as_checkpointing_wants(tensors, problem.layout)
    given = {n: v for n, v in views.items() if v is not None}
    given["out"], given["prev_num_accepted_tokens"] = given.pop("output"), given.pop("prev_num_accepted")
    if "rand_seed" in given:
        given["rand_seed"] = given["rand_seed"].reshape(1)
    longest = {"max_seqlen": case.most} if problem.layout == "packed" else {}
    flags = {"dt_softplus": case.dt_softplus, "pad_slot_id": case.pad_slot_id}
    checkpointing_ssu(**given, **longest, **flags, d_split=1, algorithm="monolith")
    pads = np.array(case.indices if case.indices is not None else [0] * case.sequences) == case.pad_slot_id
    own = np.repeat(~pads, np.diff(case.cu_seqlens)) if case.cu_seqlens is not None else ~pads
    return to_host({name: tensors[name] for name in problem.results}, "torch.cuda"), own


def ours(case, mode):
    given = to_mode(without_nan(case.arrays(seed=3)), mode, case.window)
    return to_host(results_by_name(step(mode, given, **case.flags, backend="flashinfer")), mode)


@pytest.mark.parametrize("mode", GPU_MODES)
@pytest.mark.parametrize("name", by_names(BITWISE))
def test_results(name, mode):
    """With pads, which FlashInfer's own function leaves alone."""
    case = BITWISE[name]
    assert_step(case, without_nan(case.arrays(seed=3)), mode, "flashinfer")


def by_modules(cases):
    """The same for cases."""
    common = {*map(module_of, (*DAILY, *CONTRACT[:1]))}
    for case in cases:
        marks = () if module_of(case) in common else pytest.mark.nightly
        yield pytest.param(case, id=case.name, marks=marks)


@pytest.mark.parametrize("mode", GPU_MODES)
@pytest.mark.parametrize("case", [*by_modules(CONTRACT)])
def test_contract(case, mode):
    assert_step(case, without_nan(case.arrays(seed=len(case.name))), mode, "flashinfer")


@pytest.mark.parametrize("mode", [mode for mode in GPU_MODES if mode != "jax.lax.scan"])
@pytest.mark.parametrize("server", SERVERS)
def test_a_server_on_a_random_schedule(server, mode):
    serve(SERVERS[server], mode, "flashinfer", prompts="triton")


@pytest.fixture
def pads_alone(monkeypatch):
    """Kernels run what computes the outputs of padding indices, and FlashInfer's function does nothing."""
    monkeypatch.setattr(module, "load", lambda asked: tvm_ffi.convert(lambda *_: None))
    kernel.load.cache_clear()
    yield
    kernel.load.cache_clear()


def run_alone(case):
    """Return the problem, the arrays before and the results of what computes the outputs of padding indices."""
    problem, before = problem_of(case), without_nan(case.arrays(seed=3))
    tensors = tensors_of(before, "torch.cuda")
    tensors["out"] = poisoned(tensors["x"])
    flashinfer.load(problem).function(*(tensors[name] for name in (*problem.names, *problem.results)))
    return problem, before, to_host({name: tensors[name] for name in problem.results}, "torch.cuda")


@pytest.mark.usefixtures("pads_alone")
@pytest.mark.parametrize("case", [REPLAY, REPLAY_TOKENS, REPLAY_PACKED], ids=["one token", "tokens", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_outputs_of_padding_indices(case, dtype):
    """In the tolerance of float32: they are no products of bfloat16 numbers."""
    case = typed(sized(case, indices=(-1, -1, -1)), dt=dtype, A=dtype, D=dtype, dt_bias=dtype)
    problem, before, results = run_alone(case)
    rows = judge(problem, Backend.TRITON, before, results)
    assert all(row.passed for row in rows), rows


@pytest.mark.usefixtures("pads_alone")
@pytest.mark.parametrize("case", [REPLAY, REPLAY_PACKED], ids=["one token", "packed"])
def test_outputs_of_other_indices_are_not_touched_there(case):
    problem, _, results = run_alone(sized(case, indices=(-1, 2, -1)))
    pads = np.repeat([True, False, True], np.diff(case.cu_seqlens) if problem.layout == "packed" else 1)
    is_nan = np.isnan(results["out"].astype("float32")).reshape(len(pads), -1)
    np.testing.assert_array_equal(is_nan.all(1), ~pads)
    np.testing.assert_array_equal(is_nan.any(1), ~pads)


def test_in_a_cuda_graph():
    case = BITWISE["pads"]
    given = to_mode(without_nan(case.arrays(seed=3)), "torch.cuda", case.window)
    kept = given["state"].checkpoint.clone()

    def call():
        return ssu_bridge.update(**given, **case.flags, backend="flashinfer")[0]

    expected = call().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = call()
    given["state"].checkpoint.copy_(kept)
    graph.replay()
    assert torch.equal(out, expected)


def test_a_refused_call_changes_nothing():
    case = sized(REPLAY, most=3, starts=(0,) * 6)
    given = to_mode(without_nan(case.arrays(seed=3)), "torch.cuda", case.window)
    before = to_host(given, "torch.cuda")
    with pytest.raises(ssu_bridge.UnsupportedError, match="as many tokens of each sequence as the cursor has, 3"):
        ssu_bridge.update(**given, backend="flashinfer")
    for name, array in to_host(given, "torch.cuda").items():
        np.testing.assert_array_equal(bits(array), bits(before[name]))


def test_check_passes_on_it():
    case = REPLAY_TOKENS
    given = to_mode(without_nan(case.arrays(seed=5)), "torch.cuda", case.window)
    report = ssu_bridge.check(**given, **case.flags, backend="flashinfer")
    assert report, str(report)
