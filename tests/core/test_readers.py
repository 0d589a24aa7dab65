"""What ``describe`` accepts the native readers accept, and they refuse what it refuses.

Calls are drawn from numbered seeds, as shapes, dtypes, strides and devices alone: no reader looks at memory. The cpu
kernel's reader runs in each call. What a kernel of a GPU was compiled for, ``check`` of the kernel looks at, before the
first call of a signature; so a change of a call is accepted if ``describe`` accepts it as a call of the same kernel.

What no reader looks at, and the frontends promise: that an array can be written to, which tensors do not say; and for
FlashInfer what ``refusal`` says of a Problem that ``describe`` accepts: addresses and gaps, which entries of tables there
may be, how many heads a group has and how long a packed sequence is (PROMISED).
"""

import ctypes
import dataclasses
import itertools
import math
import random
from typing import NamedTuple

import ml_dtypes  # noqa: F401  (gives NumPy the dtypes "bfloat16" and "float8_e4m3fn")
import numpy as np
import pytest
import tvm_ffi

from ssu_bridge.backends import cpu, flashinfer, triton
from ssu_bridge.backends.flashinfer import backend as flashinfer_backend
from ssu_bridge.backends.flashinfer import kernel as flashinfer_kernel
from ssu_bridge.backends.triton import backend as triton_backend
from ssu_bridge.backends.triton import forms
from ssu_bridge.backends.triton.launch import launch_of, runtime_arguments
from ssu_bridge.backends.triton.specialisation import launches, specialise
from ssu_bridge.config import SSUConfig
from ssu_bridge.core.arguments import (
    ARGUMENTS,
    CURSOR,
    QUANTIZED,
    REQUIRED,
    RINGS,
    ROUNDABLE,
    TABLES,
    TIED_AXES,
    TOKEN_AXES,
    VECTOR_BYTES,
    patterns,
)
from ssu_bridge.core.arrays import ArrayInfo
from ssu_bridge.core.problem import options_of
from ssu_bridge.core.quantized import SCALES
from ssu_bridge.core.replay_rules import _NOT_BESIDE
from ssu_bridge.core.validate import describe
from ssu_bridge.errors import UnsupportedError
from ssu_bridge.native import library

REPLAY = (*RINGS, *CURSOR)
OPTIONAL = [name for name in ARGUMENTS if name not in (*REQUIRED, "out", "cu_seqlens", *SCALES.values(), *REPLAY)]
DTYPES = sorted({dtype for argument in ARGUMENTS.values() for dtype in argument.dtypes} | {"float64", "uint16"})
SEED_DTYPES = {"": "int64", "1": "int64", "2": "uint32"}
LAYOUTS = ["dense", "gaps", "repeated", "transposed", "reversed", "shifted", "any of one entry"]
HERE, ELSEWHERE = "cpu:0", "cuda:1"
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
    if layout == "any of one entry":  # the stride of an axis of one entry means nothing
        strides = tuple(7 if n == 1 else stride for n, stride in zip(shape, strides, strict=True))
    return ArrayInfo(tuple(shape), dtype, strides, HERE, aligned=layout != "shifted")


class Drawn(NamedTuple):
    """A call: the sizes that symbols stand for, (axes, dtype, layout) of the arrays by name, and flags."""

    sizes: dict
    kinds: dict
    flags: dict

    def arrays(self, sizes=None):
        sizes = self.sizes | (sizes or {})
        sizes["Q"] = sizes["b"] + 1
        return {name: laid_out([sizes[s] for s in axes], *rest) for name, (axes, *rest) in self.kinds.items()}

    def resized(self, draw):
        """Return the arrays with one size another in all of them."""
        symbol = draw.choice([s for s in "HPNGbSTLWVEKR" if any(s in axes for axes, *_ in self.kinds.values())])
        return self.arrays({symbol: max(0, self.sizes[symbol] + draw.choice([-1, 1, 2, self.sizes[symbol]]))})


def drawn(draw, alike, replays=False):
    """Return a call whose arguments go together but for some options.

    With ``alike`` sizes, dtypes and options are among the few that FlashInfer supports; with ``replays`` the state is a
    checkpoint.
    """
    heads_axis, form = alike or replays or draw.random() < 0.7, draw.choice(["single", "multi", "packed"])
    H = draw.choice([1, 2, 4]) if heads_axis else 1
    P, N = (64, 64) if alike else draw.choice([(1, 1), (2, 3), (3, 8), (64, 64)])
    G, b, T = draw.choice([1, 1, 2, H]), draw.randint(0, 3), draw.randint(0, 3)
    more = {symbol: draw.randint(0, 2) for symbol in "LSWEK"}
    sizes = {"H": H, "P": P, "N": N, "G": G, "b": b, "T": T, "L": more["L"] + 1, "Q": b + 1, "S": b + more["S"]}
    least = T if form == "multi" else 1
    sizes |= {"W": least + more["W"], "V": max(least, 1), "E": more["E"], "1": 1, "2": 2}
    rare = {name for name in ("parent_tokens", "has_initial_state") if alike or draw.random() < 0.5}
    optional = [name for name in OPTIONAL if name not in rare]
    names = {*REQUIRED, *draw.sample(optional, draw.randint(0, 5)), "out"}
    names |= {"cu_seqlens"} if form == "packed" else set()
    names -= {"intermediate_states"} if "dst_state_batch_indices" in names else set()
    names -= {"intermediate_state_indices"} if "intermediate_states" not in names else set()
    names |= {"state_batch_indices"} if "num_accepted_tokens" in names else set()
    dtypes = {name: draw.choice(ARGUMENTS[name].dtypes) for name in ARGUMENTS if name not in REPLAY}
    dtypes |= {"out": dtypes["x"], "intermediate_states": dtypes["state"]}
    names -= {"rand_seed"} if dtypes["state"] not in ROUNDABLE else set()
    names = {*names, *REPLAY} - {*_NOT_BESIDE} if replays else names
    tokens = T + draw.randint(not T, 1)
    window = tokens + draw.randint(0, 2)
    sizes["R"] = window + tokens
    dtypes |= {"replay_x": dtypes["x"], "replay_B": dtypes["B"], "replay_dt": "float32"} | dict.fromkeys(
        CURSOR, "int32"
    )
    names |= {SCALES[name] for name in SCALES if name in names and dtypes[name] in QUANTIZED}
    if alike:
        dtypes |= dict.fromkeys(("x", "B", "C", "z", "out", "dt", "D", "dt_bias"), "bfloat16")
        dtypes["A"] = "float32"
    stride = draw.randint(1, 3) if {"intermediate_states"} & names and "parent_tokens" not in names and not alike else 1
    sizes["K"] = least // stride + more["K"]
    kinds = {}
    for name in ARGUMENTS:
        if name not in names:
            continue
        shapes = patterns(name, form, heads_axis)
        if name in ("B", "C") and G > 1:  # without an axis for them there is one group
            shapes = shapes[:1]
        tables = (name, "num_accepted_tokens" in names) == ("state_batch_indices", True)
        tables |= (name, "parent_tokens" in names) == ("dst_state_batch_indices", True)
        tied = name in TIED_AXES and (alike or (replays and draw.random() < 0.95))
        shapes = shapes[:1] if replays and name == "state_batch_indices" else shapes
        pattern = shapes[-1] if tables or tied else draw.choice(shapes)
        if name == "rand_seed":
            dtypes[name] = SEED_DTYPES[pattern]
        layout = "dense" if draw.random() < 0.9 else draw.choice(LAYOUTS)
        kinds[name] = (pattern, dtypes[name], layout)
    no_update = "dst_state_batch_indices" not in names and not replays and draw.random() < 0.3
    flags = {"intermediate_stride": stride, "disable_state_update": no_update}
    return Drawn(sizes, kinds, flags | {"replay": (window, tokens) if replays else (0, 0)})


def changed(draw, arrays):
    """Return the arrays with one of another shape, dtype or layout."""
    name = draw.choice(sorted(arrays))
    shape, dtype, strides = arrays[name].shape, arrays[name].dtype, arrays[name].strides
    what = draw.choice(["size", "axis", "dtype", "layout", "stride", "device"])
    if what == "device":
        return {**arrays, name: arrays[name]._replace(device=ELSEWHERE)}
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
    return {**arrays, name: ArrayInfo(shape, dtype, strides, HERE)}


def described(arrays, flags):
    """Return the Problem, or None where the check rejects the call."""
    no_update, stride = flags["disable_state_update"], flags["intermediate_stride"]
    options = options_of(True, -1, no_update, True, False, stride, None, None, None, SSUConfig(), *flags["replay"])
    # JAX has a seed of two words, the others one of a single number.
    framework = "jax" if "rand_seed" in arrays and arrays["rand_seed"].dtype == "uint32" else "numpy"
    try:
        return describe(arrays, options, framework=framework, platform="cpu")
    except (ValueError, UnsupportedError):
        return None


class Elsewhere:
    """A tensor as if it lay on a GPU."""

    def __init__(self, tensor):
        self.capsule = tensor.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        device = pointer(self.capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)  # after the address
        (ctypes.c_int32 * 2).from_address(device)[:] = self.__dlpack_device__()

    def __dlpack_device__(self):
        return 2, 1

    def __dlpack__(self, **_):
        return self.capsule


def views(problem, arrays):
    for name in (*problem.names, *problem.results):
        info = arrays[name]
        # A seed of two words is JAX's, and XLA aligns all that it allocates.
        shift = 0 if info.aligned or info.dtype == "uint32" else np.dtype(info.dtype).itemsize
        tensor = library().view(ADDRESS + shift, info.shape, info.strides, info.dtype)
        yield tensor if info.device == HERE else tvm_ffi.from_dlpack(Elsewhere(tensor))


# What of a Problem a compiled kernel depends on, and whether it takes an accepted call as one of its own.


def check_of_triton(problem):
    """Return the check of a kernel that is not compiled."""
    s = specialise(problem, forms.tile(problem))
    passed = [tuple(runtime_arguments(one).values()) for one in launches(s)]
    reader, launch = triton_backend._reader(s), launch_of(s)
    return lambda *tensors: triton_backend._check(s, reader, launch, passed, *tensors)


def triton_serves(problem, other, arrays):
    """Whether the kernel of a Problem is right for another: in another form or tile it computes the same."""
    s, o = (specialise(p, forms.tile(p)) for p in (problem, other))
    as_one_chunk = not s.tile.one_chunk or max(other.tokens, 1) <= s.tile.chunk
    vectors = {*other.names, "out"} - {*s.tied, *s.unaligned, *TABLES, "rand_seed"}
    lies_well = all(is_aligned(name, arrays[name], other.layout) for name in vectors)
    rows = [name for name in (*other.names, "out") if ARGUMENTS[name].free == "*"]
    lies_well &= not s.dense or all(has_dense_rows(arrays[name], other.layout) for name in rows)
    own = dataclasses.replace(o, kernel=s.kernel, tile=s.tile, unaligned=s.unaligned, dense=s.dense)
    return own == s and as_one_chunk and lies_well


def has_dense_rows(info, form):
    """Whether the tokens of an array follow each other without gaps; of a tied view the entries that do not repeat."""
    axis = len(TOKEN_AXES[form]) - 1
    row = math.prod(n for n, stride in zip(info.shape[axis + 1 :], info.strides[axis + 1 :], strict=True) if stride)
    return 0 in info.shape or info.shape[axis] == 1 or info.strides[axis] == row


def is_aligned(name, info, form):
    free = len(ARGUMENTS[name].free.replace("*", TOKEN_AXES[form]))
    size = np.dtype(info.dtype).itemsize
    strides = [stride * size for n, stride in list(zip(info.shape, info.strides, strict=True))[:free] if n > 1]
    return info.aligned and (0 in info.shape or not any(stride % VECTOR_BYTES for stride in strides))


PROMISED = ("at addresses that are multiples of 16", "and got gaps between entries", "heads in a group",
            "at least as many slots as sequences", "an entry of intermediate states per slot", "padding index in",
            "no sequence has more than")  # fmt: skip


def flashinfer_serves(problem, other, arrays):
    """Whether the module and the adapter of a Problem are those of another."""
    kept = [
        (p.names, p.results, dict(p.dtypes) | {"out": None}, p.layout, p.headdim, p.dstate,
         max(p.tokens, 1) if p.layout == "multi" else None, {*TIED_AXES} & {*p.names} == {*p.tied})
        for p in (problem, other)
    ]  # fmt: skip
    serves = kept[0] == kept[1]
    refused = flashinfer.refusal(other) if serves else None
    assert refused is None or any(promise in refused for promise in PROMISED), refused
    return serves


H200 = (9, 0)
READERS = {
    "cpu": (cpu, lambda problem: cpu.load(problem).check, lambda *_: True, lambda problem: problem),
    "triton": (triton, check_of_triton, triton_serves, lambda problem: problem.on("cuda", H200)),
    "flashinfer": (
        flashinfer,
        lambda problem: flashinfer.load(problem).check,
        flashinfer_serves,
        lambda problem: problem.on("cuda", H200),
    ),
}


@pytest.fixture(autouse=True, scope="module")
def flashinfer_that_runs_nothing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flashinfer_backend.module, "load", lambda module: tvm_ffi.convert(lambda *_: None))
        flashinfer_kernel.load.cache_clear()
        yield
        flashinfer_kernel.load.cache_clear()


def accepted_calls(examples, name, alike=False, replays=False):
    """Yield drawn calls that the check and a backend accept: a number to repeat it, Problem, arrays and the call."""
    backend, _, _, placed = READERS[name]
    for number in range(examples):
        draw = random.Random(number)
        call = drawn(draw, alike, replays)
        arrays = call.arrays()
        if draw.random() < 0.2:
            arrays = changed(draw, arrays)
        problem = described(arrays, call.flags)
        if problem is not None and backend.refusal(placed(problem)) is None:
            yield number, placed(problem), arrays, call


@pytest.mark.parametrize(
    ("name", "examples", "least", "replays"),
    [
        ("cpu", 3_800, 500, False),
        ("triton", 3_500, 500, False),
        ("flashinfer", 3_000, 100, False),
        ("cpu", 3_500, 500, True),
    ],
)
@pytest.mark.parametrize("part", [3, pytest.param(1, marks=pytest.mark.nightly)], ids=["a third", "all"])
def test_the_readers_accept_what_describe_accepts_and_nothing_else(name, examples, least, replays, part):
    examples, least = examples // part, least // part
    _, check_of, serves, placed = READERS[name]
    verdicts = dict.fromkeys(itertools.product(["as drawn", "changed", "resized"], [True, False]), 0)
    for number, problem, arrays, call in accepted_calls(examples, name, name == "flashinfer", replays):
        check, draw = check_of(problem), random.Random(number)
        calls = {"as drawn": arrays, "changed": changed(draw, arrays), "resized": call.resized(draw)}
        for what, given in calls.items():
            other = described(given, call.flags)
            expected = other is not None and serves(problem, placed(other), given)
            try:
                check(*views(problem, given))
                error = None
            except ValueError as refused:
                error = refused
            assert (error is None) == expected, f"call {number} {what}, {given}: {error or 'the reader accepts it'}"
            verdicts[what, expected] += 1
    assert verdicts.pop(("as drawn", False)) == 0
    assert min(verdicts.values()) >= least, verdicts


def test_a_kernel_of_one_chunk_takes_no_more_tokens():
    shapes = {"state": "SHPN", "x": "bTHP", "dt": "bTH", "A": "H", "B": "bTN", "C": "bTN", "out": "bTHP"}
    call = Drawn(
        {"S": 2, "b": 2, "T": 16, "H": 2, "P": 16, "N": 16},
        {name: (axes, "bfloat16", "dense") for name, axes in shapes.items()},
        {"intermediate_stride": 1, "disable_state_update": False, "replay": (0, 0)},
    )
    problem, more = (described(call.arrays({"T": count}), call.flags).on("cuda", H200) for count in (16, 17))
    assert forms.tile(problem).one_chunk
    check = check_of_triton(problem)
    check(*views(problem, call.arrays({"T": 9})))
    with pytest.raises(ValueError, match="compiled for 0 to 16 tokens, got 17"):
        check(*views(more, call.arrays({"T": 17})))
