"""What ``describe`` accepts the native readers accept: of shapes, dtypes, strides and which arguments there are."""

import ml_dtypes  # noqa: F401  (gives NumPy the dtypes "bfloat16" and "float8_e4m3fn")
import numpy as np
import pytest
import tvm_ffi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssu_bridge.backends import cpu, flashinfer, triton
from ssu_bridge.backends.flashinfer import backend as flashinfer_backend
from ssu_bridge.backends.triton import tiles
from ssu_bridge.backends.triton.compile import launch_of, runtime_arguments, specialise
from ssu_bridge.config import SSUConfig
from ssu_bridge.core.arguments import ARGUMENTS, QUANTIZED, REQUIRED, ROUNDABLE, TIED_AXES, VECTOR_BYTES, patterns
from ssu_bridge.core.arrays import ArrayInfo
from ssu_bridge.core.problem import options_of
from ssu_bridge.core.quantized import SCALES
from ssu_bridge.core.validate import describe
from ssu_bridge.native import library

OPTIONAL = [name for name in ARGUMENTS if name not in (*REQUIRED, "out", *SCALES.values())]
LAYOUTS = ["dense", "gaps", "repeated", "transposed", "reversed", "shifted"]


def laid_out(shape, dtype, layout):
    """Make an array of zeros, with a layout in memory that calls may or may not have."""
    size = np.dtype(dtype).itemsize
    if layout == "gaps" and shape:
        return np.zeros((shape[0], 2, *shape[1:]), dtype)[:, 0]
    if layout == "repeated" and shape:  # one element along the last axes
        return np.broadcast_to(np.zeros((*shape[:1], *[1] * (len(shape) - 1)), dtype), shape)
    if layout == "transposed":
        return np.zeros(shape[::-1], dtype).T
    if layout == "reversed" and shape:
        return np.zeros(shape, dtype)[::-1]
    if layout == "shifted":  # by an element from a multiple of what a GPU loads at once
        return np.zeros(int(np.prod(shape)) * size + size, "u1")[size:].view(dtype).reshape(shape)
    return np.zeros(shape, dtype)


@st.composite
def calls(draw, alike):
    """Arrays by name and flags: mostly right, some with an array that has another size, axis, dtype or layout.

    With ``alike`` sizes, dtypes and options are among the few that FlashInfer supports.
    """
    heads_axis, form = alike or draw(st.booleans()), draw(st.sampled_from(["single", "multi", "packed"]))
    small = st.integers(0, 3)
    H = draw(st.sampled_from([1, 2, 4])) if heads_axis else 1
    P, N = (64, 64) if alike else draw(st.sampled_from([(1, 1), (2, 3), (3, 8), (64, 64)]))
    G, b, T = draw(st.sampled_from([1, 1, 2, H])), draw(small), draw(small)
    sizes = {"H": H, "P": P, "N": N, "G": G, "b": b, "T": T, "L": draw(small), "Q": b + 1, "S": b + draw(small)}
    sizes |= {"W": T + draw(small), "V": max(T, 1), "E": draw(small), "K": T + draw(small), "1": 1, "2": 2}
    optional = [name for name in OPTIONAL if not alike or name not in ("parent_tokens", "has_initial_state")]
    names = {*REQUIRED, *draw(st.sets(st.sampled_from(optional), max_size=5)), "out"}
    names = names | {"cu_seqlens"} if form == "packed" else names - {"cu_seqlens"}
    dtypes = {name: draw(st.sampled_from(ARGUMENTS[name].dtypes)) for name in ARGUMENTS if name in names}
    if draw(st.integers(0, 9)):  # what goes together
        dtypes["out"] = dtypes["x"]
        dtypes |= {"intermediate_states": dtypes["state"]} if "intermediate_states" in names else {}
        dtypes |= {"rand_seed": "int64"} if "rand_seed" in names else {}
        names -= {"rand_seed"} if dtypes["state"] not in ROUNDABLE else set()
        names |= {SCALES[name] for name in SCALES if name in names and dtypes[name] in QUANTIZED}
    if alike:
        dtypes |= dict.fromkeys(dtypes.keys() & {"x", "B", "C", "z", "out", "dt", "D", "dt_bias"}, "bfloat16")
        dtypes["A"] = "float32"
    spoilt = draw(st.none() | st.sampled_from(sorted(names)))
    arrays = {}
    for name in ARGUMENTS:
        if name not in names:
            continue
        shapes = patterns(name, form, heads_axis)
        if name in ("B", "C") and G > 1:  # without an axis for them there is one group
            shapes = shapes[:1]
        pattern = shapes[-1] if alike and name in TIED_AXES else draw(st.sampled_from(shapes))
        shape = [sizes[symbol] for symbol in pattern]
        if name == spoilt and shape and draw(st.booleans()):
            axis = draw(st.integers(0, len(shape) - 1))
            shape = draw(
                st.sampled_from([[*shape[:axis], shape[axis] + 1, *shape[axis + 1 :]], shape[1:], [*shape, 1]])
            )
        layout = draw(st.sampled_from(LAYOUTS)) if name == spoilt or draw(st.integers(0, 9)) == 9 else "dense"
        arrays[name] = laid_out(tuple(shape), dtypes.get(name, "float32"), layout)
    flags = {"disable_state_update": draw(st.booleans()), "dt_softplus": draw(st.booleans())}
    return arrays, flags


def described(arrays, flags):
    """Return the Problem, or None where the check rejects the call."""
    options = options_of(
        flags["dt_softplus"], -1, flags["disable_state_update"], True, False, 1, None, None, SSUConfig()
    )
    infos = {
        name: ArrayInfo(
            array.shape,
            array.dtype.name,
            tuple(stride // array.itemsize for stride in array.strides),
            aligned=array.ctypes.data % VECTOR_BYTES == 0,
        )
        for name, array in arrays.items()
    }
    try:
        return describe(infos, options, framework="numpy", platform="cpu")
    except ValueError:
        return None


def view(array):
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return library().view(array.ctypes.data, array.shape, strides, array.dtype.name)


def read_on_cpu(problem, tensors):
    cpu.load(problem).function(*tensors)


def read_for_cubin(problem, tensors):
    specialisation = specialise(problem, tiles.tile(problem))
    rows = tuple(runtime_arguments(specialisation).values())
    library().cubin_arguments(launch_of(specialisation).grid, rows, tensors)


def read_for_flashinfer(problem, tensors):
    flashinfer.load(problem).function(*tensors)


H200 = (9, 0)
READERS = {
    "cpu": (cpu, read_on_cpu, lambda problem: problem),
    "triton": (triton, read_for_cubin, lambda problem: problem.on("cuda", H200)),
    "flashinfer": (flashinfer, read_for_flashinfer, lambda problem: problem.on("cuda", H200)),
}


@pytest.fixture(autouse=True, scope="module")
def flashinfer_that_runs_nothing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flashinfer_backend.module, "load", lambda module: tvm_ffi.convert(lambda *_: None))
        yield


def assert_readers_accept(examples, alike, names, least):
    """Draw calls, read with each reader those that the check and its backend accept, and count them."""
    read_calls = dict.fromkeys(names, 0)

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(call=calls(alike))
    def read_what_is_accepted(call):
        problem = described(*call)
        for name in names if problem else ():
            backend, read, placed = READERS[name]
            there = placed(problem)
            if backend.refusal(there) is None:
                read(there, [view(call[0][array]) for array in (*there.names, *there.results)])
                read_calls[name] += 1

    read_what_is_accepted()
    assert all(count >= least for count in read_calls.values()), read_calls


def test_what_describe_accepts_the_kernels_read():
    assert_readers_accept(8_000, alike=False, names=("cpu", "triton"), least=400)


def test_what_describe_accepts_the_adapter_reads():
    assert_readers_accept(2_000, alike=True, names=("flashinfer",), least=50)
