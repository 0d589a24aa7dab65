"""FlashInfer's functions as kernels: what distinguishes one from another, its loading and its check."""

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping
from typing import Any

from ssu_bridge.backends.base import DeviceKernel
from ssu_bridge.backends.flashinfer import module
from ssu_bridge.backends.flashinfer.module import Module, ReplayModule
from ssu_bridge.backends.rows import ANY_TOKENS, compiled_check
from ssu_bridge.core.arguments import TIED_AXES
from ssu_bridge.core.problem import Problem
from ssu_bridge.native import library


class AddedAxis(enum.IntEnum):
    """Where x and what has its axes get an axis of one entry, by its numbers in native code."""

    NONE = 0
    TOKEN = 1
    LEADING = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Specialisation:
    """Everything that distinguishes one kernel from another.

    Attributes:
        module: what FlashInfer compiles.
        names: the arrays that the kernel takes.
        scalars: (name, value) of FlashInfer's arguments that are no arrays.
        added_axis: the one that FlashInfer wants besides those of the arrays.
        fills_pads: FlashInfer leaves the outputs of padding indices alone, and this package's code computes them.
    """

    module: Module | ReplayModule
    names: tuple[str, ...]
    scalars: tuple[tuple[str, int | bool], ...]
    added_axis: AddedAxis = AddedAxis.NONE
    fills_pads: bool = False

    @property
    def target(self) -> str:
        """The specialisation spelt out."""
        scalars = ";".join(f"{name}={value:d}" for name, value in self.scalars)
        function = self.module.function + ("+pads" if self.fills_pads else "")
        return (
            f"ssu_bridge.flashinfer({function};{self.module};{','.join(self.names)};{scalars};axis={self.added_axis})"
        )


def kernel_of(problem: Problem, specialisation: Specialisation, sizes: Mapping[str, int]) -> DeviceKernel:
    """Return a kernel with the check that tensors are what it was compiled for.

    Args:
        problem: the one that it is for.
        specialisation: the kernel's.
        sizes: those that are compiled in, by their symbols.
    """
    kernel = load(specialisation)
    dtypes = tuple((name, dtype) for name, dtype in problem.dtypes if name != "out")
    tokens = max(problem.tokens, 1)
    layout_tokens = (tokens, tokens) if problem.layout == "multi" else ANY_TOKENS
    reader = _reader(dtypes, problem.results, problem.layout, tuple(sizes.items()), layout_tokens)
    return kernel._replace(check=functools.partial(_check, reader, kernel.check))


@functools.lru_cache(maxsize=256)
def _reader(
    dtypes: tuple[tuple[str, str], ...],
    results: tuple[str, ...],
    layout: str,
    sizes: tuple[tuple[str, int], ...],
    tokens: tuple[int, int],
) -> Callable[..., object]:
    """Return the check that tensors are what a module was compiled for, tied as the adapter takes them."""
    return compiled_check(dtypes, results, tied=TIED_AXES, tables=None, layout=layout, sizes=dict(sizes), tokens=tokens)


def _check(reader: Callable[..., object], adapter: Callable[..., object], *tensors: Any) -> None:
    reader(*tensors)
    adapter(*tensors)


@functools.lru_cache(maxsize=256)
def load(specialisation: Specialisation) -> DeviceKernel:
    """Return the kernel, which FlashInfer may have to compile; its check is the adapter's alone."""
    import tvm_ffi

    functions = [module.load(specialisation.module)]
    if specialisation.fills_pads:
        functions.append(module.load_pads())
    # Around functions that run nothing, the adapter reads the tensors all the same. What FlashInfer's own launchers
    # check is not known without a launch.
    nothing = tvm_ffi.convert(lambda *_: None)
    return DeviceKernel(specialisation.target, _adapted(functions, specialisation), _adapted([nothing], specialisation))


def _adapted(functions: list[Any], specialisation: Specialisation) -> Any:
    """Return functions of FlashInfer's signature, to be called one after the other, as a kernel."""
    return library().flashinfer_kernel(
        functions,
        specialisation.module.parameters,
        specialisation.names,
        dict(specialisation.scalars),
        int(specialisation.added_axis),
    )
