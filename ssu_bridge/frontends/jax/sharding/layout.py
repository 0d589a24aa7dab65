"""Where the arrays of a step have to lie on a mesh of devices for the state to stay where it is."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from jax.sharding import PartitionSpec

from ssu_bridge.core.arguments import SLOT_TABLES, WRITTEN
from ssu_bridge.core.problem import Problem
from ssu_bridge.errors import UnsupportedError
from ssu_bridge.frontends.jax.mapped_axes import Axes, Maps, axes_of

# For each axis of an array, the mesh axes that it is sharded over.
Place = tuple[tuple[Any, ...], ...]


class Layout:
    """Where the arrays of a step have to be for the state to stay where it is.

    Attributes:
        given: of each array, where it is, without mesh axes of one device.
        places: where it has to be; "out" is where x is.
        heads: the mesh axes over which heads are sharded.
        all: those over which anything of the state is, or what ``jax.vmap`` maps.
    """

    def __init__(
        self,
        problem: Problem,
        shapes: Mapping[str, tuple[int, ...]],
        given: Mapping[str, Place],
        mesh: Mapping[Any, int],
        maps: Maps = (),
    ):
        """Find them for arrays of these shapes in these places of a mesh with axes of these sizes.

        Raises:
            UnsupportedError: the step cannot be computed shard by shard with the state where it is.
        """
        symbols = {name: axes_of(problem, name, len(shape), maps) for name, shape in shapes.items()}
        sizes = {symbol: n for name, shape in shapes.items() for symbol, n in zip(symbols[name], shape, strict=True)}
        given = {name: spread(place, mesh) for name, place in given.items()}
        wanted = _wanted(symbols, given, sizes, mesh, range(len(maps)))
        for symbol, axes in wanted.items():
            _check(problem, symbol, sizes.get(symbol, 1), axes, mesh)
        if wanted["S"]:
            wanted["b"] = wanted["S"]
            if "intermediate_states" in shapes:
                if "intermediate_state_indices" in shapes or sizes["E"] != problem.slots:
                    raise UnsupportedError(
                        f"intermediate_states: expected an entry for each slot, and no indices, {_LOCAL}"
                    )
                wanted["E"] = wanted["S"]
        self.places = {n: tuple(wanted.get(symbol, ()) for symbol in symbols[n]) for n in shapes}
        divides = problem.ngroups % _count(wanted["H"], mesh) == 0
        for name in ("B", "C", "replay_B"):
            # Groups may be sharded as the heads are, where no shard has a part of a group.
            axis = symbols[name].index("G") if "G" in symbols.get(name, ()) else None
            if axis is not None and given[name][axis] == wanted["H"] and divides:
                self.places[name] = (*self.places[name][:axis], wanted["H"], *self.places[name][axis + 1 :])
            elif name == "replay_B" and axis is not None:
                _check_groups(problem, wanted["H"], mesh)
        for name in shapes:
            # Where calls are XLA may have chosen itself, as for an array that is repeated for each.
            own, place = (_own(symbols[name], where[name]) for where in (self.places, given))
            if name in WRITTEN and own != place:
                raise UnsupportedError(
                    f"{name}: expected to be sharded as the state is, {spec_of(own)}, got {spec_of(place)}"
                )
        self.given, self.places["out"] = given, self.places["x"]
        self.heads = wanted["H"]
        self.all = tuple(dict.fromkeys(axis for axes in wanted.values() for axis in axes))


def _wanted(
    symbols: Mapping[str, Axes],
    given: Mapping[str, Place],
    sizes: Mapping[int | str, int],
    mesh: Mapping[Any, int],
    maps: Iterable[int],
) -> dict[Any, tuple[Any, ...]]:
    """Return the mesh axes for each axis of the state, and for each mapped one."""
    state = dict(zip(symbols["state"], given["state"], strict=True))
    used = {axis for axes in state.values() for axis in axes}
    wanted = {"H": (), "P": (), **state}
    for number in maps:
        if number not in state:  # which is only read then: each part of it is where all calls are
            name = next(name for name in ("x", *symbols) if number in symbols[name])
            axes = given[name][symbols[name].index(number)]
            wanted[number] = tuple(axis for axis in axes if axis not in used)
        if sizes[number] % _count(wanted[number], mesh):  # what is padded or cut XLA may shard unevenly
            wanted[number] = ()
    return wanted


def _own(symbols: Axes, place: Place) -> Place:
    """Return where the axes of one call are."""
    return tuple(axes for symbol, axes in zip(symbols, place, strict=True) if isinstance(symbol, str))


_LOCAL = "where slots are sharded; call update inside jax.shard_map, with indices that count from 0 in each shard"


def own_slots(problem: Problem) -> bool:
    """Return whether sequence i has slot i and there are no other slots, so that both can be sharded alike."""
    indexed = any(name in problem.names for name in SLOT_TABLES)
    return problem.layout != "packed" and not indexed and problem.slots == problem.sequences


def _check(problem: Problem, symbol: str | int, size: int, axes: tuple[Any, ...], mesh: Mapping[Any, int]) -> None:
    """Check that an axis of the state can be sharded over these axes of the mesh."""
    if not axes:
        return
    over = " and ".join(map(repr, axes))
    if symbol == "N":
        raise UnsupportedError(
            f"state: its last axis (dstate) is sharded over {over}, but a row is summed on one device; shard heads, "
            "headdim or sequences"
        )
    if symbol == "S" and not own_slots(problem):
        raise UnsupportedError(
            f"state: its slots are sharded over {over}; expected no indices, as many slots as sequences and no "
            f"cu_seqlens {_LOCAL}"
        )
    if size % _count(axes, mesh):
        raise UnsupportedError(
            f"state: an axis of {size} is sharded over {_count(axes, mesh)} devices ({over}); expected a number that "
            "divides it"
        )


def _check_groups(problem: Problem, heads: tuple[Any, ...], mesh: Mapping[Any, int]) -> None:
    """Check that a ring of B, whose groups are not sharded as the heads are, can be: each shard writes its own."""
    if heads and problem.ngroups > 1:
        count, axes = _count(heads, mesh), " and ".join(map(repr, heads))
        got = "which to_replay shards so" if problem.ngroups % count == 0 else "which cannot be"
        raise UnsupportedError(
            f"replay_B: expected one group, or a multiple of {count} groups, sharded over {axes} as the heads are; "
            f"got {problem.ngroups} groups, {got}"
        )


def _count(axes: tuple[Any, ...], mesh: Mapping[Any, int]) -> int:
    return math.prod(mesh[axis] for axis in axes)


def spec_of(place: Place) -> PartitionSpec:
    """Return a place as JAX spells it."""
    return PartitionSpec(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in place))  # type: ignore[no-untyped-call]


def place_of(spec: PartitionSpec, count: int) -> Place:
    """Return the place of an array of so many axes."""
    axes = [() if axis is None else axis if isinstance(axis, tuple) else (axis,) for axis in spec]
    return (*axes, *[()] * (count - len(axes)))


def spread(place: Place, mesh: Mapping[Any, int]) -> Place:
    """Return a place without the mesh axes of one device, which shard nothing."""
    return tuple(tuple(axis for axis in axes if mesh[axis] > 1) for axes in place)
