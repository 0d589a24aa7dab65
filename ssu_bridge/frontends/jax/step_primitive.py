"""The step as a JAX primitive, over however many devices its arrays lie on."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, mlir

from ssu_bridge.backends.base import DeviceKernel
from ssu_bridge.core.problem import Problem
from ssu_bridge.dispatch import consider_problem, load, program_options
from ssu_bridge.errors import UnsupportedError
from ssu_bridge.frontends.jax import reshape_in_place
from ssu_bridge.frontends.jax.ffi_targets import register, spell
from ssu_bridge.frontends.jax.kernel_primitive import kernel, lower, register_lowering, result_types
from ssu_bridge.frontends.jax.mapped_axes import Maps, vmapped
from ssu_bridge.frontends.jax.metadata import platforms, several_devices
from ssu_bridge.frontends.jax.sharding.automatic import kernels_in, partitioned_jaxpr
from ssu_bridge.frontends.jax.xla_errors import own_errors

# Its operands are what ``problem.names`` lists, its results what ``problem.results`` does, with the axes of ``maps``; x
# and what is written in place have all of them. ``shards`` is the step that XLA can partition, where the process has
# several devices: JAX looks for it in here, and then says which mesh they form.
step = Primitive("ssu_bridge_update")
step.multiple_results = True


def bind(arrays: dict[str, Any], problem: Problem, maps: Maps = ()) -> list[Any]:
    """Put the step into the program that is being traced, or run it; return its results."""
    kinds = tuple((array.shape, array.dtype) for array in arrays.values())
    shards = partitioned_jaxpr(problem, maps, kinds) if several_devices() else None
    operands = vary_alike(arrays.values())
    results: list[Any] = step.bind(*operands, problem=problem, maps=maps, shards=shards)  # type: ignore[no-untyped-call]
    return results


def vary_alike(arrays: Iterable[Any]) -> list[Any]:
    """Inside shard_map, mark all operands as varying over each mesh axis that one varies over, as the results do."""
    axes = [varying(jax.typeof(array)) for array in arrays]
    union = frozenset().union(*axes)
    return [
        jax.lax.pcast(array, tuple(union - own), to="varying") if union - own else array
        for array, own in zip(arrays, axes, strict=True)
    ]


def varying(kind: Any) -> frozenset[Any]:
    """Return the mesh axes over which an array of this type varies; versions of JAX differ in where they keep them."""
    manual = getattr(kind, "manual_axis_type", None)
    return frozenset(kind.vma if manual is None else manual.varying)


@step.def_abstract_eval  # type: ignore[untyped-decorator]
def _result_types(*operands: Any, problem: Problem, **_: Any) -> tuple[Any, ...]:
    types: tuple[Any, ...] = result_types(*operands, problem=problem)
    return types


@step.def_impl  # type: ignore[untyped-decorator]
def _run_at_once(*operands: Any, problem: Problem, **parameters: Any) -> Any:
    """Run the step where nothing traces or jits it, as under ``jax.disable_jit``."""
    with own_errors(), jax.disable_jit(False):
        return _jitted(problem=_of_this_process(problem), **parameters)(*operands)


def _of_this_process(problem: Problem) -> Problem:
    options = program_options(problem.options, platforms(), seeded=problem.stochastic_rounding)
    return dataclasses.replace(problem, options=options)


@functools.lru_cache(maxsize=256)
def _jitted(**parameters: Any) -> Callable[..., Any]:
    return jax.jit(functools.partial(step.bind, **parameters))


def _lower(ctx: Any, *operands: Any, problem: Problem, maps: Maps, shards: Any, platform: str | None = None) -> Any:
    if _devices(ctx.module_context.axis_context) == 1:
        if not maps:
            return lower(ctx, *operands, problem=problem, platform=platform)
        calls = vmapped(functools.partial(kernel.bind, problem=problem), problem.names, maps)
        return mlir.lower_fun(calls, multiple_results=True)(ctx, *operands)
    if hasattr(ctx.module_context.axis_context, "mesh"):
        raise UnsupportedError(
            "inside jax.shard_map over some axes of a mesh, XLA cannot partition the step over the others; expected "
            "all axes of the mesh in axis_names"
        )
    if not getattr(jax.config, "jax_use_shardy_partitioner", True):  # XLA's older one would end the process
        raise UnsupportedError("only Shardy can partition the step; expected jax_use_shardy_partitioner, got it off")
    if (platform or ctx.module_context.platforms[0]) == "cpu":
        _register_for_cpu(shards)
    return mlir.lower_fun(jaxpr_as_fun(shards), multiple_results=True)(ctx, *operands)


def _register_for_cpu(shards: Any) -> None:
    """Register what the partitioned step calls: a process that finds it in JAX's compilation cache never lowers it.

    A kernel of the CPU is the same for every shard. One of a GPU is known when the step is partitioned; a program from
    the cache that calls one which is not registered does not load, and JAX compiles it again.
    """
    for problem in kernels_in(shards.jaxpr):
        if isinstance(loaded := load(problem.on("cpu")), DeviceKernel):
            register(spell(loaded, problem), loaded, "cpu")
            reshape_in_place.register()


def _devices(context: Any) -> int:
    """Return over how many devices XLA is to partition a program; inside shard_map that has been done."""
    if hasattr(context, "mesh"):
        return math.prod(n for axis, n in context.mesh.shape.items() if axis not in context.manual_axes)
    return getattr(context, "num_devices", 1)


register_lowering(step, _lower)


def _refuse_gradient(*_: Any, problem: Problem, **__: Any) -> Any:
    selected = (consider_problem(problem.on(*platform)).backend for platform in platforms().items())
    names = " or ".join(dict.fromkeys(str(backend) for backend in selected if backend))
    raise UnsupportedError(f'backend {names}: it cannot be differentiated; use backend="xla"')


ad.primitive_jvps[step] = _refuse_gradient
