"""What ``jax.vmap`` maps: the axes that arrays have beyond those of one call."""

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


def over_calls(function: Callable[..., Any], names: Iterable[str], maps: Maps) -> Callable[..., Any]:
    """Return what does for arrays with mapped axes what a function of the arrays of one call does."""
    for mapped in reversed(maps):
        function = jax.vmap(function, in_axes=tuple(0 if name in mapped else None for name in names))
    return function
