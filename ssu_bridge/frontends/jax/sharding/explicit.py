"""Explicit mesh axes: the operands' types say where they are, and the step runs inside jax.shard_map."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ssu_bridge.config import Backend
from ssu_bridge.core.problem import Problem
from ssu_bridge.errors import UnsupportedError
from ssu_bridge.frontends.jax.mapped_axes import Maps, axes_of, vmapped
from ssu_bridge.frontends.jax.sharding.layout import Layout, Place, place_of, spec_of
from ssu_bridge.frontends.jax.sharding.shards import localised, shard_seed
from ssu_bridge.frontends.jax.xla_errors import is_mapped_elsewhere


def explicit_mesh(arrays: Iterable[Any]) -> Any:
    """Return the mesh over whose explicit axes arrays are sharded, or None; on explicit axes alone, any arrays.

    Inside ``jax.vmap`` their types do not say over which axes what is mapped is sharded.
    """
    for array in arrays:
        mesh = jax.typeof(array).sharding.mesh
        if set(mesh.axis_types) == {AxisType.Explicit} or _explicit_axes(array):
            return mesh
    return None


def _explicit_axes(array: Any) -> set[Any]:
    """Return the explicit axes over which an array is sharded."""
    sharding = jax.typeof(array).sharding
    kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    named = {axis for axes in place_of(sharding.spec, array.ndim) for axis in axes}
    return {axis for axis in named if kinds[axis] == AxisType.Explicit}


def on_explicit_shards(problem: Problem, arrays: dict[str, Any], mesh: Any, run: Callable[..., Any]) -> tuple[Any, ...]:
    """Run a step shard by shard; ``run`` takes its options and a shard's arrays by name, and returns its results."""
    if problem.options.config.backend is not Backend.XLA:
        return tuple(_mappable(problem, tuple(arrays), mesh, run, ())(*arrays.values()))
    # What a rule of ours maps would have no gradient.
    if any(map(_explicit_axes, arrays.values())):
        return _on_shards(problem, tuple(arrays), mesh, run, (), *arrays.values())
    return tuple(run(problem.options, arrays))


# What jax.vmap maps is sharded over mesh axes that the types inside it do not name. JAX's own rule for a shard_map
# leaves those out of it, and gathers along them. So the one shard_map is around all calls, and they are mapped in it.


def _mappable(problem: Problem, names: tuple[str, ...], mesh: Any, run: Callable[..., Any], maps: Maps) -> Any:
    @custom_vmap
    def call(*operands: Any) -> Any:
        return _jitted(problem, names, mesh, run, maps)(*operands)

    @call.def_vmap
    def mapped(size: int, batched: list[bool], *operands: Any) -> Any:
        around = frozenset(name for name, is_mapped in zip(names, batched, strict=True) if is_mapped)
        results = _mappable(problem, names, mesh, run, (around, *maps))(*operands)
        return results, (True,) * len(results)

    return call


@functools.lru_cache(maxsize=256)
def _jitted(*arguments: Any) -> Callable[..., Any]:
    """Return the shards' step for arrays as they come: an eager call that is mapped would compile it each time."""
    return jax.jit(functools.partial(_on_shards, *arguments))


def _on_shards(
    problem: Problem, names: tuple[str, ...], mesh: Any, run: Callable[..., Any], maps: Maps, *operands: Any
) -> tuple[Any, ...]:
    arrays = dict(zip(names, operands, strict=True))
    given = {n: place_of(jax.typeof(a).sharding.spec, a.ndim) for n, a in arrays.items()}
    layout = Layout(problem, {n: a.shape for n, a in arrays.items()}, given, mesh.shape, maps)

    # A ring of B that all shards of heads have is written alike by all of them, which JAX cannot infer.
    inferred = not problem.replays

    def of_one_call(*shards: Any) -> Any:
        given = localised(problem, layout, dict(zip(names, shards, strict=True)))
        if "rand_seed" in given and not inferred:  # else it is where the call is traced that types say what varies
            given["rand_seed"] = shard_seed(given["rand_seed"], layout.all)
        return tuple(run(problem.options, given))

    # A result has the axes of all maps, and of its argument those of one call.
    symbols = {n: axes_of(problem, n, a.ndim, maps) for n, a in arrays.items()}
    calls = [given[n][symbols[n].index(number)] for number, (n, *_) in enumerate(map(sorted, maps))]
    like = ["x" if name == "out" else name for name in problem.results]

    def of_results(places: Mapping[str, Place]) -> list[PartitionSpec]:
        return [spec_of((*calls, *places[n][sum(n in mapped for mapped in maps) :])) for n in like]

    in_specs = tuple(spec_of(layout.places[name]) for name in names)
    out_specs = tuple(of_results(layout.places))
    placed = tuple(_put(array, mesh, spec) for array, spec in zip(arrays.values(), in_specs, strict=True))
    on_shard = vmapped(of_one_call, names, maps)
    try:
        results = jax.shard_map(on_shard, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=inferred)(
            *placed
        )
    except ValueError as error:
        if not is_mapped_elsewhere(error):
            raise
        raise UnsupportedError(
            f"state: each call's is sharded {spec_of(layout.places['state'])}, over a mesh axis that what jax.vmap maps"
            " is sharded over, too; expected others"
        ) from error
    # Its type is its argument's, which may name mesh axes of one device.
    kept = {n: given[n] if layout.given[n] == layout.places[n] else layout.places[n] for n in like}
    return tuple(_put(result, mesh, spec) for result, spec in zip(results, of_results(kept), strict=True))


def _put(array: Any, mesh: Any, spec: PartitionSpec) -> Any:
    """Reshard an array, if its type has it elsewhere."""
    if jax.typeof(array).sharding.spec == spec:
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, spec))  # type: ignore[no-untyped-call]
