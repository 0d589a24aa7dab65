"""The reference backend: the step in NumPy and float64, the exact results that others are compared with."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from ssu_bridge.backends.base import HostKernel, no_settings, nothing_missing
from ssu_bridge.backends.reference.exact import Exact, Step, Store, by_token, places_first, single
from ssu_bridge.backends.reference.replay import from_checkpoint
from ssu_bridge.core import rounding
from ssu_bridge.core.problem import Problem
from ssu_bridge.core.quantized import SCALES

__all__ = ["Exact", "Store", "compute", "places_first", "single"]

PLATFORM = None
CONFIG_FIELDS = ("philox_rounds", "round_each_token")
missing = nothing_missing
settings = no_settings


def refusal(problem: Problem) -> str | None:
    """Refuse traced arrays, which have no values to copy."""
    return "it computes on the host and so cannot be traced by JAX" if problem.traced else None


def load(problem: Problem) -> HostKernel:
    """Return a function that runs the step on NumPy arrays."""
    return HostKernel(functools.partial(_run, problem))


def compute(problem: Problem, arrays: Mapping[str, Any], *, coarse_softplus: bool = False) -> Exact:
    """Compute a call in float64.

    Args:
        problem: the description of the call.
        arrays: NumPy arrays by name, as ``problem.names`` lists them. They are only read.
        coarse_softplus: the bounds are for a softplus that is rounded as numbers near 1 are, small as it may be.
    """
    step = Step(problem, arrays, coarse_softplus)
    return from_checkpoint(problem, arrays, step) if problem.replays else by_token(problem, arrays, step)


def _run(problem: Problem, arrays: dict[str, np.ndarray], out: np.ndarray) -> None:
    exact = compute(problem, arrays)
    rows = out.reshape(-1, *exact.out.shape[1:])
    rows[exact.rows] = rounding.rounded(single(exact.out[exact.rows]), out.dtype.name)
    out[...] = rows.reshape(out.shape)
    for name, store in exact.stores.items():
        array = places_first(name, arrays[name])
        for number in range(len(store.states)):  # one after another, so that the last one counts
            place = tuple(index[number] for index in store.places)
            words = None if store.words is None else store.words[number]
            numbers, scales = rounding.stored(single(store.states[number]), array.dtype.name, words)
            array[place] = numbers.reshape(array[place].shape)
            if scales is not None:
                arrays[SCALES[name]][place] = scales.reshape(arrays[SCALES[name]][place].shape)
