"""Automatic mesh axes: XLA decides where arrays are and asks (custom_partitioning with a Shardy rule)."""

import functools
import hashlib
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import ClosedJaxpr
from jax.sharding import NamedSharding, PartitionSpec

from ssu_bridge.core.arguments import ARGUMENTS
from ssu_bridge.core.problem import Problem
from ssu_bridge.dispatch import consider_problem
from ssu_bridge.errors import UnsupportedError
from ssu_bridge.frontends.jax.kernel_primitive import kernel
from ssu_bridge.frontends.jax.mapped_axes import Maps, axes_of, vmapped
from ssu_bridge.frontends.jax.metadata import described, platforms
from ssu_bridge.frontends.jax.sharding.layout import Layout, own_slots, place_of, spec_of
from ssu_bridge.frontends.jax.sharding.shards import localised, shard_seed


@functools.lru_cache(maxsize=256)
def partitioned_jaxpr(problem: Problem, maps: Maps, kinds: tuple[Any, ...]) -> Any:
    """Return the step that XLA can partition, for operands of these shapes and dtypes."""
    step = _partitioned(problem, maps)

    def program(*operands: Any) -> Any:
        return step(*operands)

    program.__name__ = f"ssu_bridge_{_digest(problem, maps, kinds)}"
    return jax.make_jaxpr(jax.jit(program))(*(jax.ShapeDtypeStruct(*kind) for kind in kinds))  # type: ignore[no-untyped-call]


def _digest(problem: Problem, maps: Maps, kinds: tuple[Any, ...]) -> str:
    """Return a digest of all that the partitioned program depends on, the same in every process.

    Before XLA partitions it, the program's text says nothing else of the flags, of the backend or of how this version
    divides a step: by the text alone JAX's compilation cache would take one for another.
    """
    backends = [consider_problem(problem.on(*platform)).backend for platform in platforms().items()]
    said = (_version(), backends, problem, [sorted(names) for names in maps], kinds)
    return hashlib.sha256(repr(said).encode()).hexdigest()[:32]


# One string.
@functools.cache
def _version() -> str:
    """Return the installed version, which is read from a file."""
    return importlib.metadata.version("ssu-bridge")


def kernels_in(program: Any) -> Iterator[Problem]:
    """Yield the problem of each kernel that a program calls where nothing partitions it."""
    for equation in program.eqns:
        if equation.primitive is kernel:
            yield equation.params["problem"]
        for value in equation.params.values():
            if isinstance(value, ClosedJaxpr):
                yield from kernels_in(value.jaxpr)


def _partitioned(problem: Problem, maps: Maps) -> Callable[..., Any]:
    @custom_partitioning
    def step(*operands: Any) -> Any:
        return tuple(vmapped(functools.partial(kernel.bind, problem=problem), problem.names, maps)(*operands))

    def partition(mesh: Any, operands: Any, results: Any) -> Any:
        names = problem.names
        given = {n: place_of(_known(a.sharding), len(a.shape)) for n, a in zip(names, operands, strict=True)}
        shapes = {n: a.shape for n, a in zip(names, operands, strict=True)}
        layout = Layout(problem, shapes, given, mesh.shape, maps)

        def of_one_call(*shards: Any) -> Any:
            arrays = localised(problem, layout, dict(zip(names, shards, strict=True)))
            if "rand_seed" in arrays:
                arrays["rand_seed"] = shard_seed(arrays["rand_seed"], layout.all)
            return tuple(kernel.bind(*arrays.values(), problem=described(problem.options, arrays)))  # type: ignore[no-untyped-call]

        def shardings(names: Iterable[str]) -> tuple[NamedSharding, ...]:
            return tuple(NamedSharding(mesh, spec_of(layout.places[name])) for name in names)

        return mesh, vmapped(of_one_call, names, maps), shardings(problem.results), shardings(names)

    step.def_partition(partition=partition, sharding_rule=functools.partial(_rule, problem, maps))  # type: ignore[no-untyped-call]
    return step


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
