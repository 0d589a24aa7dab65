"""Exported programs: the safety checks to disable, and loading the kernels that a program calls."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.export import DisabledSafetyCheck, Exported
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir

from ssu_bridge.backends.base import DeviceKernel
from ssu_bridge.core.arguments import DTYPES, SIZES
from ssu_bridge.core.arrays import ArrayInfo
from ssu_bridge.core.problem import Problem
from ssu_bridge.core.validate import axes, describe
from ssu_bridge.dispatch import consider_problem, load
from ssu_bridge.errors import UnsupportedError
from ssu_bridge.frontends.jax.ffi_targets import Call, parse, register, registered, spell
from ssu_bridge.frontends.jax.metadata import platforms

# Stands for a size that a program leaves open. A call may have as many slots, entries, columns and steps.
_OPEN = 2**62
# The fewest that fit with any numbers of the sizes that are not symbolic.
_FEWEST = {"b": 1, "Q": 2, "T": 1, "L": 1}


class Checks(Sequence[Any]):
    """The calls to allow: of all kernels that are registered when JAX looks, after it has lowered a program."""

    def __iter__(self) -> Iterator[Any]:
        return map(DisabledSafetyCheck.custom_call, registered())

    def __len__(self) -> int:
        return len(registered())

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


def prepare(exported: Exported) -> tuple[str, ...]:
    """Load and register every kernel that a program calls; return their names."""
    if not isinstance(exported, Exported):
        raise TypeError(f"exported: expected a jax.export.Exported, got {type(exported).__name__}")
    here = platforms()
    if not set(exported.platforms) & set(here):
        raise UnsupportedError(
            f"the program was exported for {', '.join(exported.platforms)}, and this process has {', '.join(here)}"
        )
    prepared = []
    for target, kinds in _calls(exported.mlir_module_serialized):
        call = _call(target, kinds)
        problem = _problem(call, kinds)
        able = [problem.on(name, here[name]) for name in exported.platforms if name in here]
        choices = [consider_problem(on_platform) for on_platform in able]
        if all(choice.backend is None for choice in choices) and set(exported.platforms) <= set(here):
            raise choices[0].error()
        # Of a program for several platforms, what is not for one of this process is left out.
        for choice in choices:
            if choice.backend is not None:
                _prepare(target, call, choice.problem)
                prepared.append(target)
    return tuple(dict.fromkeys(prepared))


def _prepare(target: str, call: Call, problem: Problem) -> None:
    kernel = load(problem)
    assert isinstance(kernel, DeviceKernel)
    if kernel.target != call.kernel:
        raise UnsupportedError(
            f"the program calls {target}; this device and version of ssu_bridge have {spell(kernel, problem)}; export "
            "it again here"
        )
    assert problem.platform is not None
    # By the program's name, which may spell more of the call than is spelt now.
    register(target, kernel, problem.platform)


def _calls(program: bytes) -> list[tuple[str, list[ArrayInfo]]]:
    """Return the target of each call of a kernel in a serialised program, and what its operands are.

    The program is walked as it is: its text would have every number of its constants in it.
    """
    calls = []

    def visit(operation: Any) -> Any:
        if operation.name == "stablehlo.custom_call":
            target = operation.attributes["call_target_name"].value
            if target.startswith("ssu_bridge."):
                calls.append((target, [_info(operand.type, dtypes) for operand in operation.operands]))
        return ir.WalkResult.ADVANCE

    with mlir.make_ir_context() as context:
        dtypes = {mlir.dtype_to_ir_type(np.dtype(name)): name for name in DTYPES}
        stablehlo.deserialize_portable_artifact(context, program).operation.walk(visit)
    return calls


def _info(kind: Any, dtypes: dict[Any, str]) -> ArrayInfo:
    shape = tuple(_OPEN if kind.is_dynamic_dim(axis) else kind.get_dim_size(axis) for axis in range(kind.rank))
    return ArrayInfo(shape, dtypes.get(kind.element_type, str(kind.element_type)))


def _call(target: str, kinds: list[ArrayInfo]) -> Call:
    call = parse(target)
    if call is None or len(kinds) < len(call.names):
        raise UnsupportedError(
            f"the program calls {target}, which this version of ssu_bridge does not know; export it again"
        )
    return call


def _problem(call: Call, kinds: list[ArrayInfo]) -> Problem:
    # Operands after the arrays give XLA the shapes of the results, where sizes are symbolic.
    arrays = _closed(dict(zip(call.names, kinds[: len(call.names)], strict=True)))
    return describe(arrays, call.options, framework="jax", platform=None, traced=True)


def _closed(arrays: dict[str, ArrayInfo]) -> dict[str, ArrayInfo]:
    """Put numbers where a program leaves sizes open that a kernel reads in each call."""
    closed = {}
    for name, symbols in axes(arrays).items():
        sizes = list(zip(symbols, arrays[name].shape, strict=True))
        for symbol, size in sizes:
            if size == _OPEN and symbol in "HPNG":
                raise UnsupportedError(
                    f"{name}: the program leaves {SIZES[symbol]} open, and a kernel is for one {SIZES[symbol]}; export "
                    "it for a number, with symbols for numbers of sequences, tokens, slots and entries alone"
                )
        shape = tuple(_FEWEST.get(symbol, _OPEN) if size == _OPEN else size for symbol, size in sizes)
        closed[name] = arrays[name]._replace(shape=shape)
    return closed
