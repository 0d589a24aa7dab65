"""The step on one device as a JAX primitive, lowered to the kernel that is chosen for the platform."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from ssu_bridge.backends.base import DeviceKernel, HostKernel, TracedKernel
from ssu_bridge.core.problem import Problem
from ssu_bridge.dispatch import load
from ssu_bridge.frontends.jax.ffi_targets import register, spell
from ssu_bridge.frontends.jax.metadata import platforms
from ssu_bridge.native import library

# Where no tensor lies, aligned as XLA aligns all that it allocates. Nothing is read there.
_ADDRESS = 256
# Its operands are what ``problem.names`` lists, its results what ``problem.results`` does.
kernel = Primitive("ssu_bridge_kernel")
kernel.multiple_results = True


@kernel.def_abstract_eval  # type: ignore[untyped-decorator]
def result_types(*operands: Any, problem: Problem) -> tuple[Any, ...]:
    """Return the types of the results."""
    types = dict(zip(problem.names, operands, strict=True))
    types["out"] = types["x"]
    return tuple(types[name].update(weak_type=False) for name in problem.results)


def lower(ctx: Any, *operands: Any, problem: Problem, platform: str | None = None) -> Any:
    """Load the kernel for a platform, and put a call of it into the program."""
    platform = platform or ctx.module_context.platforms[0]
    loaded = load(problem.on(platform, platforms().get(platform)))
    if isinstance(loaded, TracedKernel):
        function = functools.partial(_by_name, loaded.function, problem.names)
        return mlir.lower_fun(function, multiple_results=True)(ctx, *operands)
    assert not isinstance(loaded, HostKernel)
    _require_readable(loaded, ctx.avals_in, problem)
    # What is written in place is an operand and a result of one buffer. XLA copies one that must not be changed. For a
    # result that it writes straight into a slice of another array XLA:GPU takes other memory; kernels see to that.
    aliases = {problem.names.index(name): i for i, name in enumerate(problem.results) if name != "out"}
    target = register(spell(loaded, problem), loaded, platform)
    lowering = jax.ffi.ffi_lowering(target, operand_output_aliases=aliases)
    if loaded.scratch is None:
        return lowering(ctx, *operands)
    # One more result, which nobody reads: XLA allocates it for the time of the call.
    scratch = jax.core.ShapedArray((loaded.scratch(problem),), np.dtype("float32"))
    return lowering(ctx.replace(avals_out=[*ctx.avals_out, scratch]), *operands)[:-1]


def _require_readable(loaded: DeviceKernel, operands: Any, problem: Problem) -> None:
    """Let the kernel check the operands' types before there is a program that donates the state to it.

    When a kernel raises while a program runs, what was donated is gone. Arrays of JAX are dense, and a program is for
    one set of shapes and dtypes, so the kernel has nothing left to refuse. Symbolic sizes have no numbers yet.
    """
    kinds = dict(zip(problem.names, operands, strict=True))
    kinds["out"] = kinds["x"]
    if any(type(size) is not int for kind in kinds.values() for size in kind.shape):
        return
    loaded.check(*(_tensor_like(kinds[name]) for name in (*problem.names, *problem.results)))


def _tensor_like(kind: Any) -> Any:
    strides = tuple(math.prod(kind.shape[axis + 1 :]) for axis in range(len(kind.shape)))
    return library().view(_ADDRESS, kind.shape, strides, kind.dtype.name)


def _by_name(function: Callable[..., Any], names: tuple[str, ...], *arrays: Any) -> Any:
    return function(dict(zip(names, arrays, strict=True)))


def register_lowering(primitive: Primitive, rule: Callable[..., Any]) -> None:
    """Give a primitive a rule that knows the platform, also where one program is lowered for several."""
    mlir.register_lowering(primitive, rule)
    for name in ("cpu", "cuda"):
        mlir.register_lowering(primitive, functools.partial(rule, platform=name), platform=name)


register_lowering(kernel, lower)
