"""What ``describe`` accepts the native readers accept, and the cpu kernel's reader refuses what it refuses.

Calls are drawn from numbered seeds, as shapes, dtypes and strides alone: no reader looks at memory. The launcher of
cubins and FlashInfer's adapter are held to one direction. A cubin is compiled for a Problem, and its launcher relies on
``describe`` for all that is compiled in: sizes, dtypes, which strides are dense, how many columns a table needs. It
checks what a call can still differ in without another Problem: the device, addresses and strides that have to be
multiples of what is loaded at once, and how many blocks there are. The adapter relies on it in the same way.
"""

import itertools
import math
import random

import ml_dtypes  # noqa: F401  (gives NumPy the dtypes "bfloat16" and "float8_e4m3fn")
import numpy as np
import pytest
import tvm_ffi

from ssu_bridge.backends import cpu, flashinfer, triton
from ssu_bridge.backends.flashinfer import backend as flashinfer_backend
from ssu_bridge.backends.triton import forms
from ssu_bridge.backends.triton.compile import launch_of, runtime_arguments, specialise
from ssu_bridge.config import SSUConfig
from ssu_bridge.core.arguments import ARGUMENTS, QUANTIZED, REQUIRED, ROUNDABLE, TIED_AXES, patterns
from ssu_bridge.core.arrays import ArrayInfo
from ssu_bridge.core.problem import options_of
from ssu_bridge.core.quantized import SCALES
from ssu_bridge.core.validate import describe
from ssu_bridge.native import library

OPTIONAL = [name for name in ARGUMENTS if name not in (*REQUIRED, "out", "cu_seqlens", *SCALES.values())]
DTYPES = sorted({dtype for argument in ARGUMENTS.values() for dtype in argument.dtypes} | {"float64", "uint16"})
SEED_DTYPES = {"": "int64", "1": "int64", "2": "uint32"}
LAYOUTS = ["dense", "gaps", "repeated", "transposed", "reversed", "shifted"]
# Where no array lies.
ADDRESS = 1 << 12


def dense_strides(shape):
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def laid_out(shape, dtype, layout="dense"):
    """Return an array of a layout that calls may or may not have."""
    strides = dense_strides(shape)
    if layout == "gaps":
        strides = tuple(2 * stride for stride in strides[:1]) + strides[1:]
    if layout == "repeated":  # one element along the last axes
        strides = strides[:1] + (0,) * len(strides[1:])
    if layout == "transposed":
        strides = dense_strides(shape[::-1])[::-1]
    if layout == "reversed":
        strides = tuple(-stride for stride in strides[:1]) + strides[1:]
    return ArrayInfo(tuple(shape), dtype, strides, aligned=layout != "shifted")


def drawn(draw, alike):
    """Return arrays by name and flags that go together but for some options.

    With ``alike`` sizes, dtypes and options are among the few that FlashInfer supports.
    """
    heads_axis, form = alike or draw.random() < 0.7, draw.choice(["single", "multi", "packed"])
    H = draw.choice([1, 2, 4]) if heads_axis else 1
    P, N = (64, 64) if alike else draw.choice([(1, 1), (2, 3), (3, 8), (64, 64)])
    G, b, T = draw.choice([1, 1, 2, H]), draw.randint(0, 3), draw.randint(0, 3)
    more = {symbol: draw.randint(0, 2) for symbol in "LSWEK"}
    sizes = {"H": H, "P": P, "N": N, "G": G, "b": b, "T": T, "L": more["L"] + 1, "Q": b + 1, "S": b + more["S"]}
    least = T if form == "multi" else 1
    sizes |= {"W": least + more["W"], "V": max(least, 1), "E": more["E"], "K": least + more["K"], "1": 1, "2": 2}
    rare = {name for name in ("parent_tokens", "has_initial_state") if alike or draw.random() < 0.5}
    optional = [name for name in OPTIONAL if name not in rare]
    names = {*REQUIRED, *draw.sample(optional, draw.randint(0, 5)), "out"}
    names |= {"cu_seqlens"} if form == "packed" else set()
    names -= {"intermediate_states"} if "dst_state_batch_indices" in names else set()
    names -= {"intermediate_state_indices"} if "intermediate_states" not in names else set()
    names |= {"state_batch_indices"} if "num_accepted_tokens" in names else set()
    dtypes = {name: draw.choice(ARGUMENTS[name].dtypes) for name in ARGUMENTS}
    dtypes |= {"out": dtypes["x"], "intermediate_states": dtypes["state"]}
    names -= {"rand_seed"} if dtypes["state"] not in ROUNDABLE else set()
    names |= {SCALES[name] for name in SCALES if name in names and dtypes[name] in QUANTIZED}
    if alike:
        dtypes |= dict.fromkeys(("x", "B", "C", "z", "out", "dt", "D", "dt_bias"), "bfloat16")
        dtypes["A"] = "float32"
    arrays = {}
    for name in ARGUMENTS:
        if name not in names:
            continue
        shapes = patterns(name, form, heads_axis)
        if name in ("B", "C") and G > 1:  # without an axis for them there is one group
            shapes = shapes[:1]
        tables = (name, "num_accepted_tokens" in names) == ("state_batch_indices", True)
        tables |= (name, "parent_tokens" in names) == ("dst_state_batch_indices", True)
        pattern = shapes[-1] if tables or (alike and name in TIED_AXES) else draw.choice(shapes)
        if name == "rand_seed":
            dtypes[name] = SEED_DTYPES[pattern]
        layout = "dense" if draw.random() < 0.9 else draw.choice(LAYOUTS)
        arrays[name] = laid_out([sizes[symbol] for symbol in pattern], dtypes[name], layout)
    stride = draw.randint(1, 3) if "intermediate_states" in names and "parent_tokens" not in names else 1
    flags = {"intermediate_stride": 1 if alike else stride}
    flags |= {"disable_state_update": "dst_state_batch_indices" not in names and draw.random() < 0.3}
    return arrays, flags


def changed(draw, arrays):
    """Return the arrays with one of another shape, dtype or layout."""
    name = draw.choice(sorted(arrays))
    shape, dtype, strides = arrays[name].shape, arrays[name].dtype, arrays[name].strides
    what = draw.choice(["size", "axis", "dtype", "layout", "stride"])
    if what == "dtype":
        dtype = draw.choice(DTYPES)
    if what == "layout":
        return {**arrays, name: laid_out(shape, dtype, draw.choice(LAYOUTS))}
    if what == "axis":
        place = draw.randint(0, len(shape))
        shapes = [shape[:place] + shape[place + 1 :], (*shape[:place], 1, *shape[place:])]
        return {**arrays, name: laid_out(draw.choice(shapes), dtype)}
    if shape and what in ("size", "stride"):
        axis = draw.randrange(len(shape))
        if what == "size":
            size = max(0, shape[axis] + draw.choice([-2, -1, 1, 2]))
            shape = (*shape[:axis], size, *shape[axis + 1 :])
            strides = dense_strides(shape)
        else:
            stride = draw.choice([-1, 0, 1, 2, 3, 6, strides[axis] - 1, strides[axis] + 1, 2 * strides[axis]])
            strides = (*strides[:axis], stride, *strides[axis + 1 :])
    return {**arrays, name: ArrayInfo(shape, dtype, strides)}


def described(arrays, flags):
    """Return the Problem, or None where the check rejects the call."""
    no_update, stride = flags["disable_state_update"], flags["intermediate_stride"]
    options = options_of(True, -1, no_update, True, False, stride, None, None, SSUConfig())
    # JAX has a seed of two words, the others one of a single number.
    framework = "jax" if "rand_seed" in arrays and arrays["rand_seed"].dtype == "uint32" else "numpy"
    try:
        return describe(arrays, options, framework=framework, platform="cpu")
    except ValueError:
        return None


def views(problem, arrays):
    for name in (*problem.names, *problem.results):
        info = arrays[name]
        # A seed of two words is JAX's, and XLA aligns all that it allocates.
        shift = 0 if info.aligned or info.dtype == "uint32" else np.dtype(info.dtype).itemsize
        yield library().view(ADDRESS + shift, info.shape, info.strides, info.dtype)


def read_on_cpu(problem, tensors):
    cpu.load(problem).check(*tensors)


def read_for_cubin(problem, tensors):
    specialisation = specialise(problem, forms.tile(problem))
    rows = tuple(runtime_arguments(specialisation).values())
    library().cubin_arguments(launch_of(specialisation).grid, rows, [*tensors])


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


def accepted_calls(examples, name, alike=False):
    """Yield drawn calls that the check and a backend accept: a number to repeat it, Problem, arrays and flags."""
    backend, _, placed = READERS[name]
    for number in range(examples):
        draw = random.Random(number)
        arrays, flags = drawn(draw, alike)
        if draw.random() < 0.2:
            arrays = changed(draw, arrays)
        problem = described(arrays, flags)
        if problem is not None and backend.refusal(placed(problem)) is None:
            yield number, placed(problem), arrays, flags


@pytest.mark.parametrize(("name", "examples", "least"), [("triton", 8_000, 2_000), ("flashinfer", 2_000, 100)])
def test_what_describe_accepts_the_readers_accept(name, examples, least):
    count = 0
    for number, problem, arrays, _ in accepted_calls(examples, name, alike=name == "flashinfer"):
        try:
            READERS[name][1](problem, views(problem, arrays))
        except ValueError as error:
            raise AssertionError(f"call {number}, {arrays}: {error}") from error
        count += 1
    assert count >= least


def test_the_cpu_reader_accepts_what_describe_accepts_and_nothing_else():
    verdicts = dict.fromkeys(itertools.product(["as drawn", "changed"], [True, False]), 0)
    for number, problem, arrays, flags in accepted_calls(8_000, "cpu"):
        kernel, draw = cpu.load(problem), random.Random(number)
        for what, given in {"as drawn": arrays, "changed": changed(draw, arrays)}.items():
            expected = described(given, flags) is not None
            try:
                kernel.check(*views(problem, given))
                error = None
            except ValueError as refused:
                error = refused
            assert (error is None) == expected, f"call {number} {what}, {given}: {error or 'the reader accepts it'}"
            verdicts[what, expected] += 1
    assert verdicts.pop(("as drawn", False)) == 0
    assert min(verdicts.values()) >= 1_000, verdicts
