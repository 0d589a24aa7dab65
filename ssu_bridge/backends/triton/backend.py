"""The triton backend: the project's own GPU kernel, for JAX and Torch arrays on NVIDIA GPUs.

Triton compiles it once for each specialisation; the native library launches it, without Python or Triton in a call.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from ssu_bridge.backends.base import DeviceKernel, cannot_run_there, missing_jax_ffi
from ssu_bridge.backends.rows import ANY_TOKENS, compiled_check
from ssu_bridge.backends.triton import forms, replay
from ssu_bridge.backends.triton.compile import compile_step
from ssu_bridge.backends.triton.disk_cache import cached
from ssu_bridge.backends.triton.launch import (
    FLOAT_BYTES,
    Argument,
    Kind,
    Launch,
    dense_strides,
    launch_of,
    runtime_arguments,
)
from ssu_bridge.backends.triton.specialisation import Specialisation, launches, specialise
from ssu_bridge.core.problem import Problem
from ssu_bridge.native import library
from ssu_bridge.progress import compiling

PLATFORM = "cuda"
CONFIG_FIELDS = ("philox_rounds", "round_each_token", "triton_tile", "algorithm")
settings = forms.settings

# A tile is addressed in 32 bits inside a head.
_MOST_ELEMENTS_OF_A_HEAD = 2**31


def missing(framework: str) -> str | None:
    """Return whether Triton, or for JAX arrays its FFI package, is not installed."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return missing_jax_ffi(framework)


def refusal(problem: Problem) -> str | None:
    """Refuse devices other than NVIDIA GPUs of a supported compute capability, and what the kernels lack."""
    if reason := cannot_run_there(problem):
        return reason
    if problem.headdim * problem.dstate >= _MOST_ELEMENTS_OF_A_HEAD:
        return f"it supports heads of less than 2**31 elements, and these have {problem.headdim * problem.dstate}"
    return forms.refusal(problem)


def load(problem: Problem) -> DeviceKernel:
    """Return the kernel for the problem's sizes and dtypes, whatever the number of sequences and slots."""
    return _kernel(specialise(problem, forms.tile(problem)))


# Unbounded: a kernel stays loaded, because a CUDA graph may launch it, and one that is forgotten would be loaded twice.
@functools.cache
def _kernel(specialisation: Specialisation) -> DeviceKernel:
    launch, kernels = launch_of(specialisation), launches(specialisation)
    with compiling("a Triton kernel", "usually about a second; it is kept on disk"):
        compiled = [cached(one, functools.partial(compile_step, one)) for one in kernels]
    passed = [
        tuple(runtime_arguments(one)[name] for name in kernel.passed)
        for one, kernel in zip(kernels, compiled, strict=True)
    ]
    rows = [
        (k.cubin, k.name, k.shared_bytes, k.warps, grid, arguments, k.scratch_pointers, scratch)
        for k, grid, arguments, scratch in zip(compiled, launch.grids, passed, launch.scratch, strict=True)
    ]
    function = library().cubin_kernel(rows, launch.tensors, launch.in_place, launch.overlaps)
    check = functools.partial(_check, specialisation, _reader(specialisation), launch, passed)
    return DeviceKernel(
        specialisation.target, function, check, functools.partial(_scratch, launch) if any(launch.scratch) else None
    )


def _scratch(launch: Launch, problem: Problem) -> Any:
    parts = zip(launch.grids, launch.scratch, strict=True)
    return sum(g.blocks(problem.sequences, problem.tokens) * (each // FLOAT_BYTES) for g, each in parts if each)


def _reader(s: Specialisation) -> Callable[..., object]:
    """Return the check that tensors are what a kernel was compiled for, but for addresses and strides in bytes."""
    return compiled_check(
        s.dtypes,
        s.results,
        tied=s.tied,
        tables=s.tables,
        layout=s.layout,
        sizes=_sizes(s),
        intermediate_stride=s.intermediate_stride,
        tokens=_tokens(s),
    )


def _sizes(s: Specialisation) -> dict[str, int]:
    return s.sizes | ({"R": s.window + s.most_tokens} if s.window else {})


def _tokens(s: Specialisation) -> tuple[int, int]:
    if s.window:
        return replay.tokens_of(s)
    return (0, s.tile.chunk) if s.tile.one_chunk else ANY_TOKENS


def _check(
    s: Specialisation,
    reader: Callable[..., object],
    launch: Launch,
    passed: Sequence[Sequence[Argument]],
    *tensors: Any,
) -> None:
    reader(*tensors)
    for grid, arguments in zip(launch.grids, passed, strict=True):
        library().cubin_arguments(grid, [one for one in arguments if one.tensor < launch.tensors], tensors)
    grid = launch.grids[-1]
    for name, argument, expected in dense_strides(s):
        entries, tokens = (argument._replace(kind=Kind.SIZE, axis=axis) for axis in (0, argument.axis))
        _, count, length, came = library().cubin_arguments(grid, [entries, tokens, argument], tensors)
        if count and length > 1 and came != expected:
            raise ValueError(f"{name}: expected tokens that are {expected} elements apart, got {came}")
