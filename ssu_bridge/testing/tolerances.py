"""The comparison of results with exact ones, and the only place where tolerances are set."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ssu_bridge.backends import reference
from ssu_bridge.backends.reference import places_first, single
from ssu_bridge.core import rounding
from ssu_bridge.core.arguments import RINGS
from ssu_bridge.core.quantized import SCALES

# A float32 sum of n products differs from the exact one by about sqrt(n) roundings when they are of either sign, and by
# n at worst; the exponential, softplus and sigmoid add a few. So much is allowed, in units of 2**-24 of the sum of
# absolute values, before the result is rounded to its dtype; and as much as the subnormal numbers, which XLA may take
# for zero. Rounding is exact: what is stored must be what the dtype's rule makes of a number within that distance.
ROUNDINGS = 16
_SMALLEST_NORMAL = 2.0**-126
_TOLERANCE = f"rounding of what is within {ROUNDINGS} * 2**-24 * sum of |terms|"
# Four times the rounding of a bfloat16 number, for what is made of several that were rounded.
_COARSER = 2.0**13
_COARSE = f"rounding of what is within {ROUNDINGS} * 2**-11 * sum of |terms|"
# The shares of it that are tried.
_SHARES = (0, 1 / 8, 1 / 4, 1 / 2, 1)


class Row(NamedTuple):
    """How one result compares with the reference.

    Attributes:
        name: the result's, for its part that was to be written; "rest of" it for all else, compared bit for bit.
        absolute, relative: the worst errors; of a quantised state's values, times their scale.
        where: the index of the element that comes worst of what is allowed.
        used: the share of what is allowed that this element needs; above 1 it is too much.
        tolerance: what is allowed, in words.
    """

    name: str
    absolute: float
    relative: float
    where: tuple[int, ...]
    used: float
    tolerance: str

    @property
    def passed(self) -> bool:
        """Whether every element is within its tolerance; a NaN is not."""
        return self.used <= 1


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def compare(
    exact: reference.Exact,
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray],
    *,
    coarse_rounding: bool = False,
    coarse_products: bool = False,
) -> tuple[Row, ...]:
    """Compare the results of a call with the exact ones.

    Args:
        exact: what :func:`ssu_bridge.backends.reference.compute` returned.
        before: the call's arrays by name; "out" only if it was given.
        after: its results by name.
        coarse_rounding: what is rounded stochastically may be so by other random words, and small numbers to zero.
        coarse_products: what is multiplied into outputs and states may be rounded to bfloat16 before.
    """
    if coarse_products:
        coarse = compare(_with_coarse_products(exact), before, after, coarse_rounding=coarse_rounding)
        return tuple(row._replace(tolerance=row.tolerance.replace(_TOLERANCE, _COARSE)) for row in coarse)
    out, computed = after["out"].reshape(exact.out.shape), np.flatnonzero(exact.rows)
    rows = [_rounded_row("out", (computed,), out, exact.out[computed], exact.out_bounds[computed])]
    if "out" in before and not exact.rows.all():
        rows.append(_rest("out", [(before["out"].reshape(out.shape), out)], ~exact.rows))
    before, after = ({name: places_first(name, a) for name, a in arrays.items()} for arrays in (before, after))
    for name, scale in (SCALES | dict.fromkeys(RINGS, "")).items():
        if name not in after:
            continue
        untouched = np.ones(before[name].shape[: 1 if name == "state" else 2], bool)
        if name in exact.stores:
            store = _last(exact.stores[name])
            untouched[store.places] = False
            rows += _stored(name, scale, store, after, coarse_rounding)
        rows.append(_rest(name, [(before[n], after[n]) for n in (name, scale) if n in before], untouched))
    return tuple(rows)


def _with_coarse_products(exact: reference.Exact) -> reference.Exact:
    """Return exact results with the bounds of products of bfloat16 numbers; what rings keep is not multiplied."""
    stores = {
        name: store if name in RINGS else store._replace(bounds=_COARSER * store.bounds)
        for name, store in exact.stores.items()
    }
    return exact._replace(out_bounds=_COARSER * exact.out_bounds, stores=stores)


def _last(store: reference.Store) -> reference.Store:
    """Keep the last of several stores to one place."""
    numbers = {place: number for number, place in enumerate(zip(*map(np.ndarray.tolist, store.places), strict=True))}
    kept = np.array(list(numbers.values()), np.int64)
    places = tuple(index[kept] for index in store.places)
    words = None if store.words is None else store.words[kept]
    return reference.Store(places, store.states[kept], store.bounds[kept], words)


def _stored(
    name: str, scale: str, store: reference.Store, after: Mapping[str, np.ndarray], coarse_rounding: bool
) -> list[Row]:
    """Compare the states that were stored to one array, and to its scales."""
    places, exact, bounds, words = store
    values = after[name].reshape(*after[name].shape[: len(places)], *exact.shape[1:])
    draws = _coarse(words) if coarse_rounding else (words,)
    if scale not in after:
        return [_rounded_row(name, places, values, exact, bounds, draws)]
    dtype, scales = values.dtype.name, after[scale].reshape(values.shape[:-1])[places]

    def rounded(states: np.ndarray) -> tuple[np.ndarray, ...]:
        # With the scale that was stored, which the other row is about.
        numbers = single(states) * (1 / scales)[..., None]
        return tuple(rounding.rounded(numbers, dtype, some) for some in draws)

    got = values[places]
    worth = got.astype(np.float64) * scales[..., None]
    used = _used(got, exact, bounds, rounded)
    return [
        _scale_row(scale, places, scales, exact, bounds, dtype),
        _row(name, places, worth, exact, used, _TOLERANCE + ", over the scale"),
    ]


def _scale_row(
    name: str, places: tuple[np.ndarray, ...], got: np.ndarray, exact: np.ndarray, bounds: np.ndarray, dtype: str
) -> Row:
    """Compare the scales of rows, which grow with the largest magnitude of a row."""
    wanted = rounding.scale_rows(np, single(exact), dtype)[1]
    used = np.full(got.shape, np.inf)
    for share in reversed(_SHARES):
        slack = _slack(bounds, share)
        magnitudes = single(np.maximum(np.abs(exact) - slack, 0))
        least = rounding.scale_rows(np, magnitudes, dtype)[1]
        most = rounding.scale_rows(np, single(np.abs(exact) + slack), dtype)[1]
        right = (least <= got) & (got <= most) | np.isnan(got) & np.isnan(wanted)
        # Where the least scale would have no inverse it is 1; then others that have one are right up to the largest.
        tiny = (least == 1) & (magnitudes.max(-1) < 1)
        used[right | tiny & ((got == 1) | (got > rounding.NO_INVERSE) & (got <= most) & (most < 1))] = share
    return _row(name, places, got, wanted.astype(np.float64), used, _TOLERANCE)


def _rest(name: str, pairs: list[tuple[np.ndarray, np.ndarray]], untouched: np.ndarray) -> Row:
    """Compare what must not have changed, bit for bit."""
    changed = np.zeros_like(untouched)
    for before, after in pairs:
        flat = (*untouched.shape, -1) if before.size else before.shape
        differs = _bits(before).reshape(flat) != _bits(after).reshape(flat)
        changed |= differs.any(tuple(range(changed.ndim, len(flat))))
    wrong = np.argwhere(changed & untouched)
    where = tuple(wrong[0].tolist()) if len(wrong) else ()
    return Row(f"rest of {name}", 0.0, 0.0, where, np.inf if where else 0.0, f"no bit of {untouched.sum()} entries")


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


def _slack(bounds: np.ndarray, share: float) -> np.ndarray:
    """Return a share of what is allowed; none of what is infinite is 0."""
    allowed = ROUNDINGS * 2.0**-24 * bounds + _SMALLEST_NORMAL
    return share * allowed if share else np.zeros_like(allowed)


def _rounded_row(
    name: str,
    places: tuple[np.ndarray, ...],
    array: np.ndarray,
    exact: np.ndarray,
    bounds: np.ndarray,
    words: tuple[np.ndarray | None, ...] = (None,),
) -> Row:
    """Compare elements of an array that is not quantised, rounded by one of several sets of random words."""
    got = array[places]

    def rounded(values: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(rounding.rounded(single(values), got.dtype.name, some) for some in words)

    used = _used(got, exact, bounds, rounded)
    if len(words) > 1:
        smallest_normal = float(ml_dtypes.finfo(got.dtype).smallest_normal)  # type: ignore[no-untyped-call]
        used[(got == 0) & (np.abs(exact) < smallest_normal)] = 1
    return _row(name, places, got.astype(np.float64), exact, used, _TOLERANCE)


def _coarse(words: np.ndarray | None) -> tuple[np.ndarray | None, ...]:
    """Return the random words that round up wherever any do, and those that never do."""
    return (None,) if words is None else (np.zeros_like(words), np.full_like(words, 2**32 - 1))


def _used(got: np.ndarray, exact: np.ndarray, bounds: np.ndarray, rounded: Any) -> np.ndarray:
    """Return the least share of the tolerance within which there is a number that is rounded to what was got."""
    used = np.full(got.shape, np.inf)
    for share in reversed(_SHARES):
        least = functools.reduce(np.minimum, rounded(exact - _slack(bounds, share)))
        most = functools.reduce(np.maximum, rounded(exact + _slack(bounds, share)))
        used[(least <= got) & (got <= most) | np.isnan(got) & (np.isnan(exact) | np.isnan(least))] = share
    return used


def _row(
    name: str, places: tuple[np.ndarray, ...], got: np.ndarray, exact: np.ndarray, used: np.ndarray, tolerance: str
) -> Row:
    if not exact.size:
        return Row(name, 0.0, 0.0, (), 0.0, tolerance)
    # What is right and infinite or no number has no error.
    error = np.where((used == 0) & ~np.isfinite(got), 0, np.abs(got - exact))
    nonzero = (np.abs(exact) > _SMALLEST_NORMAL) & np.isfinite(exact)
    worst = np.unravel_index(int(np.argmax(used)), used.shape)
    where = (*(index[worst[0]] for index in places), *worst[1:])
    return Row(
        name,
        float(np.max(error)),
        float(np.max(error[nonzero] / np.abs(exact[nonzero]), initial=0)),
        tuple(map(int, where)),
        float(used[worst]),
        tolerance,
    )
