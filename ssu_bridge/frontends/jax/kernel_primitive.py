"""The step on one device as a JAX primitive, lowered to the kernel that is chosen for the platform."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from ssu_bridge.backends.base import HostKernel, TracedKernel
from ssu_bridge.core.problem import Problem
from ssu_bridge.dispatch import load
from ssu_bridge.frontends.jax.ffi_targets import register, spell
from ssu_bridge.frontends.jax.metadata import platforms

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
    # What is written in place is an operand and a result of one buffer. XLA copies one that must not be changed. For a
    # result that it writes straight into a slice of another array XLA:GPU takes other memory; kernels see to that.
    aliases = {problem.names.index(name): i for i, name in enumerate(problem.results) if name != "out"}
    target = register(spell(loaded, problem), loaded, platform)
    lowering = jax.ffi.ffi_lowering(target, operand_output_aliases=aliases)
    return lowering(ctx, *operands)


def _by_name(function: Callable[..., Any], names: tuple[str, ...], *arrays: Any) -> Any:
    return function(dict(zip(names, arrays, strict=True)))


def register_lowering(primitive: Primitive, rule: Callable[..., Any]) -> None:
    """Give a primitive a rule that knows the platform, also where one program is lowered for several."""
    mlir.register_lowering(primitive, rule)
    for name in ("cpu", "cuda"):
        mlir.register_lowering(primitive, functools.partial(rule, platform=name), platform=name)


register_lowering(kernel, lower)
