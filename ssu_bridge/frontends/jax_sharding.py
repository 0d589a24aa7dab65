"""The step on arrays that are sharded over several devices: each shard of the state is updated where it is.

Heads and channels may be sharded, and sequences with their slots where sequence i has slot i. The other arrays go where
the state needs them; the state does not move.
"""

import contextlib
import functools
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ssu_bridge.config import Backend
from ssu_bridge.errors import UnsupportedError
from ssu_bridge.frontends.jax_arrays import described
from ssu_bridge.frontends.jax_kernel import kernel
from ssu_bridge.frontends.jax_layout import Layout, Place, own_slots, place_of, spec_of
from ssu_bridge.frontends.jax_maps import Maps, axes_of, over_calls
from ssu_bridge.problem import ARGUMENTS, Problem


def shard_seed(seed: Any, axes: Iterable[Any]) -> Any:
    """Give each shard along some mesh axes a seed of its own: its elements are counted from 0."""
    for axis in sorted(axes, key=str):
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), jax.lax.axis_index(axis))
        seed = jax.random.key_data(key)
    return seed


def _own_groups(problem: Problem, array: Any, heads: int, axes: tuple[Any, ...]) -> Any:
    """Return the groups of a shard's heads, from B or C with all groups; one a head if it has parts of several."""
    each = problem.nheads // problem.ngroups
    first = jax.lax.axis_index(axes) * heads
    if heads % each and each % heads:
        return jnp.take(array, (first + jnp.arange(heads)) // each, axis=-2)
    return jax.lax.dynamic_slice_in_dim(array, first // each, max(heads // each, 1), axis=-2)


def _localised(problem: Problem, layout: Layout, arrays: dict[str, Any]) -> dict[str, Any]:
    """Return the arrays of one shard's step, from the shards in the places of the layout."""
    arrays = dict(arrays)
    heads = arrays["state"].shape[1] if problem.heads_axis else 1
    for name in ("B", "C"):
        whole = problem.ngroups > 1 and arrays[name].shape[-2] == problem.ngroups
        if heads < problem.nheads and whole:
            arrays[name] = _own_groups(problem, arrays[name], heads, layout.heads)
    return arrays


# --- Automatic axes: XLA decides where arrays are, and asks ---


@functools.lru_cache(maxsize=256)
def partitioned_jaxpr(problem: Problem, maps: Maps, kinds: tuple[Any, ...]) -> Any:
    """Return the step that XLA can partition, for operands of these shapes and dtypes."""
    step = _partitioned(problem, maps)

    def program(*operands: Any) -> Any:
        return step(*operands)

    # The program's text says nothing else of the flags, nor that its kernels are registered in this process alone:
    # JAX's compilation cache would take one for another.
    program.__name__ = f"ssu_bridge_{uuid.uuid4().hex}"
    return jax.make_jaxpr(jax.jit(program))(*(jax.ShapeDtypeStruct(*kind) for kind in kinds))  # type: ignore[no-untyped-call]


def _partitioned(problem: Problem, maps: Maps) -> Callable[..., Any]:
    @custom_partitioning
    def step(*operands: Any) -> Any:
        return tuple(over_calls(functools.partial(kernel.bind, problem=problem), problem.names, maps)(*operands))

    def partition(mesh: Any, operands: Any, results: Any) -> Any:
        names = problem.names
        given = {n: place_of(_known(a.sharding), len(a.shape)) for n, a in zip(names, operands, strict=True)}
        shapes = {n: a.shape for n, a in zip(names, operands, strict=True)}
        layout = Layout(problem, shapes, given, mesh.shape, maps)

        def of_one_call(*shards: Any) -> Any:
            arrays = _localised(problem, layout, dict(zip(names, shards, strict=True)))
            if "rand_seed" in arrays:
                arrays["rand_seed"] = shard_seed(arrays["rand_seed"], layout.all)
            return tuple(kernel.bind(*arrays.values(), problem=described(problem.options, arrays)))  # type: ignore[no-untyped-call]

        def shardings(names: Iterable[str]) -> tuple[NamedSharding, ...]:
            return tuple(NamedSharding(mesh, spec_of(layout.places[name])) for name in names)

        return mesh, over_calls(of_one_call, names, maps), shardings(problem.results), shardings(names)

    step.def_partition(partition=partition, sharding_rule=functools.partial(_rule, problem, maps))  # type: ignore[no-untyped-call]
    return step


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Raise the refusal again that XLA met while it partitioned a program, and made an error of its own of."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        _, found, refusal = str(error).partition(f"{UnsupportedError.__name__}: ")
        if found:
            raise UnsupportedError(refusal.partition("\n")[0]) from error
        raise


def _known(sharding: Any) -> PartitionSpec:
    if not isinstance(sharding, NamedSharding):
        raise UnsupportedError(
            f"expected arrays sharded by NamedSharding over one mesh, got {sharding}; jax.set_mesh says which it is"
        )
    return sharding.spec


def _rule(problem: Problem, maps: Maps, mesh: Any, operands: Any, results: Any) -> str:
    """Return the step's sharding rule: which axes of which arrays are sharded alike."""
    factors = {n: _factors(problem, n, len(a.shape), maps) for n, a in zip(problem.names, operands, strict=True)}
    factors["out"] = factors["x"]
    sides = (", ".join(factors[name] for name in names) for names in (problem.names, problem.results))
    return " -> ".join(sides)


def _factors(problem: Problem, name: str, count: int, maps: Maps) -> str:
    shared: dict[int | str, str] = {number: f"m{number}" for number in range(len(maps))}
    shared |= {"H": "h", "P": "p", "b": "b", "S": "b" if own_slots(problem) else "s", "T": "t", "L": "l"}
    number = [*ARGUMENTS].index(name)
    symbols = axes_of(problem, name, count, maps)
    return " ".join(shared.get(symbol, f"a{number}x{i}") for i, symbol in enumerate(symbols)) or "..."


# --- Explicit axes: the operands' types say where they are ---


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
    on_shards = functools.partial(_on_shards, *arguments)
    # Versions before 0.10 take what jax.jit has traced inside jax.vmap for the same outside of it.
    return jax.jit(on_shards) if jax.__version_info__ >= (0, 10) else on_shards


def _on_shards(
    problem: Problem, names: tuple[str, ...], mesh: Any, run: Callable[..., Any], maps: Maps, *operands: Any
) -> tuple[Any, ...]:
    arrays = dict(zip(names, operands, strict=True))
    given = {n: place_of(jax.typeof(a).sharding.spec, a.ndim) for n, a in arrays.items()}
    layout = Layout(problem, {n: a.shape for n, a in arrays.items()}, given, mesh.shape, maps)

    def of_one_call(*shards: Any) -> Any:
        return tuple(run(problem.options, _localised(problem, layout, dict(zip(names, shards, strict=True)))))

    # A result has the axes of all maps, and of its argument those of one call.
    symbols = {n: axes_of(problem, n, a.ndim, maps) for n, a in arrays.items()}
    calls = [given[n][symbols[n].index(number)] for number, (n, *_) in enumerate(map(sorted, maps))]
    like = ["x" if name == "out" else name for name in problem.results]

    def of_results(places: Mapping[str, Place]) -> list[PartitionSpec]:
        return [spec_of((*calls, *places[n][sum(n in mapped for mapped in maps) :])) for n in like]

    in_specs = tuple(spec_of(layout.places[name]) for name in names)
    out_specs = tuple(of_results(layout.places))
    placed = tuple(_put(array, mesh, spec) for array, spec in zip(arrays.values(), in_specs, strict=True))
    on_shard = over_calls(of_one_call, names, maps)
    with _mapped_elsewhere(layout):
        results = jax.shard_map(on_shard, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(*placed)
    # Its type is its argument's, which may name mesh axes of one device.
    kept = {n: given[n] if layout.given[n] == layout.places[n] else layout.places[n] for n in like}
    return tuple(_put(result, mesh, spec) for result, spec in zip(results, of_results(kept), strict=True))


@contextlib.contextmanager
def _mapped_elsewhere(layout: Layout) -> Iterator[None]:
    """Name what is wrong where shard_map finds an axis of the mesh to be mapped: no public function of JAX says it."""
    try:
        yield
    except ValueError as error:
        if "must refer to an axis marked as manual" not in str(error):
            raise
        raise UnsupportedError(
            f"state: each call's is sharded {spec_of(layout.places['state'])}, over a mesh axis that what jax.vmap maps"
            " is sharded over, too; expected others"
        ) from error


def _put(array: Any, mesh: Any, spec: PartitionSpec) -> Any:
    """Reshard an array, if its type has it elsewhere."""
    if jax.typeof(array).sharding.spec == spec:
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, spec))  # type: ignore[no-untyped-call]
