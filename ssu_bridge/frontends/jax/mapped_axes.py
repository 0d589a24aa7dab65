"""The axes that ``jax.vmap`` adds to the arrays of a call."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from ssu_bridge.core.problem import Problem

# Of each ``jax.vmap`` around a call, the outermost first, the names of the arrays that it maps. So ordered, the mapped
# axes are an array's first.
Maps = tuple[frozenset[str], ...]
# The symbols of an array's axes: the number of the jax.vmap for a mapped one, then those of one call's.
Axes = tuple[int | str, ...]


def axes_of(problem: Problem, name: str, count: int, maps: Maps) -> Axes:
    """Return the symbols of the axes of an array that has so many."""
    mapped = [number for number, names in enumerate(maps) if name in names]
    return (*mapped, *problem.axes(name, count - len(mapped)))


def vmapped(function: Callable[..., Any], names: Iterable[str], maps: Maps) -> Callable[..., Any]:
    """Return a function of one call's arrays, vmapped over the axes of all maps."""
    for mapped in reversed(maps):
        function = jax.vmap(function, in_axes=tuple(0 if name in mapped else None for name in names))
    return function
