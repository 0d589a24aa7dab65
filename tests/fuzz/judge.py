"""Hold what a call gave against the oracle: every number, and every byte that was not to change."""

from typing import NamedTuple

import numpy as np

from fuzz.oracle import QMAX, scales_of, to_grid

SCALES = {"state": "state_scale", "intermediate_states": "intermediate_state_scales"}


class Wrong(NamedTuple):
    """What is wrong: in which result, where, and what was expected and came, in words."""

    name: str
    place: tuple
    expected: str
    got: str


def judged(expected, unit, results, shape):
    """Return the first wrong number among the results of a call, by name, or None.

    Args:
        expected: what the oracle says.
        unit: what is allowed for each unit of error.
        results: NumPy arrays by kernels' names.
        shape: (H, P, N).
    """
    with np.errstate(all="ignore"):
        out = results["out"].reshape(expected.out.shape)
        wrong = _outside(out, expected.out, unit * expected.errors, expected.known, None)
        if wrong is not None:
            return Wrong("out", *wrong)
        last = {(store.name, store.place): store for store in expected.stores}
        for store in last.values():
            wrong = _judged_store(store, unit, results, shape)
            if wrong is not None:
                name, (place, *words) = wrong
                return Wrong(name, (*store.place, *place), *words)
    return None


def stored_at(results, name, place):
    """Return what an array has in a place of the oracle's: of a ring, the row of a slot."""
    array = results[name]
    return array[place[0], :, place[1]] if name.startswith("replay") else array[place]


def _judged_store(store, unit, results, shape):
    got = stored_at(results, store.name, store.place)
    got = got.reshape(store.state.shape)
    dtype, allowed = got.dtype.name, unit * store.errors
    if dtype not in QMAX:
        wrong = _outside(got, store.state, allowed, store.known, store.words)
        return wrong and (store.name, wrong)
    name = SCALES[store.name]
    scales = results[name][store.place].reshape(shape[:2])
    magnitudes = np.abs(store.state)
    least = scales_of(np.maximum(magnitudes - allowed, 0).astype(np.float32), dtype)
    most = scales_of((magnitudes + allowed).astype(np.float32), dtype)
    right = (least <= scales) & (scales <= most)
    # Where the least scale would have no inverse it is 1; the largest may have one.
    tiny = (magnitudes - allowed).max(-1) * np.float32(1 / QMAX[dtype]) <= 2.0**-128
    right |= tiny & ((scales == 1) | ((scales <= most) & (scales > 2.0**-128)))
    if (place := _first(~right & store.known[:, None])) is not None:
        return name, (place, f"{least[place]!r} to {most[place]!r}", repr(scales[place]))
    inverse = (np.float32(1) / scales)[..., None]
    wrong = _outside(got, store.state, allowed, store.known, store.words, inverse)
    return wrong and (store.name, wrong)


def _outside(got, exact, allowed, known, words, inverse=None):
    """Return the place of the first number that is no rounding of what is within the allowed distance, with words."""
    dtype, ends = got.dtype.name, []
    for sign in (-1, 1):
        end = (exact + sign * allowed).astype(np.float32)
        ends.append(to_grid(end if inverse is None else end * inverse, dtype, words))
    right = (ends[0] <= got.astype(np.float64)) & (got.astype(np.float64) <= ends[1])
    place = _first(~right & known.reshape(known.shape + (1,) * (got.ndim - known.ndim)))
    if place is None:
        return None
    return place, f"{ends[0][place]!r} to {ends[1][place]!r}", repr(got[place].item())


def _first(wrong):
    places = np.argwhere(wrong)
    return tuple(places[0].tolist()) if len(places) else None


def may_change(expected, name, view):
    """Yield the parts of an array that a call may write: views of it."""
    if name == "out":
        leading = view.shape[: _leading(view, expected)]
        for row in np.flatnonzero(expected.written):
            yield view[np.unravel_index(row, leading)]
        return
    for store in expected.stores:
        if name in (store.name, SCALES.get(store.name)):
            yield view[store.place[0], :, store.place[1]] if name.startswith("replay") else view[store.place]


def _leading(view, expected):
    """Return how many axes of an output count its rows."""
    sizes = np.cumprod(view.shape).tolist()
    return sizes.index(len(expected.written)) + 1
