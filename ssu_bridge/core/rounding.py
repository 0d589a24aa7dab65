"""Rounding of states, to nearest or stochastically, floats or quantised, in NumPy. Kernels give the same bits.

``scale_rows`` and ``nearest`` take the namespace that they compute in, which may be ``torch`` or ``jax.numpy`` too.
"""

from typing import Any

import ml_dtypes
import numpy as np

# The largest number that a quantised state holds.
LARGEST = {"int16": 32767, "int8": 127, "float8_e4m3fn": 448}
# The largest float32 number whose inverse is infinite.
NO_INVERSE = 2.0**-128


def scale_rows(xp: Any, states: Any, dtype: str) -> tuple[Any, Any]:
    """Return float32 states over the scale of their row, and the scales: largest magnitude over largest number.

    Where the inverse of that would be infinite, as of 0, the scale is 1 and the row becomes 0. A row with an infinity
    or a NaN in it has a scale that is one.
    """
    with np.errstate(invalid="ignore"):
        scales = xp.amax(xp.abs(states), -1) * float(np.float32(1 / LARGEST[dtype]))
        scales = xp.where(scales <= NO_INVERSE, 1.0, scales)
        return states * (1.0 / scales)[..., None], scales


def nearest(xp: Any, values: Any, dtype: str) -> Any:
    """Return float32 values that a cast to the dtype leaves as they are, or rounds to nearest even."""
    if dtype not in LARGEST:
        return values
    if not dtype.startswith("float"):
        values = xp.where(xp.isnan(values), 0.0, xp.round(values))
    return xp.clip(values, -LARGEST[dtype], LARGEST[dtype])


def stored(values: np.ndarray, dtype: str, words: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Return what is stored of float32 states (..., N): numbers of the dtype and, of a quantised one, their scales."""
    scales = None
    if dtype in LARGEST:
        values, scales = scale_rows(np, values, dtype)
    return rounded(values, dtype, words), scales


def widened(numbers: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """Return the float32 states (..., N) that stored ones stand for."""
    values = numbers.astype(np.float32)
    with np.errstate(invalid="ignore"):  # an infinite scale times 0
        return values if scales is None else values * scales[..., None]


def grid_step(values: np.ndarray, scales: np.ndarray | None, dtype: str) -> np.ndarray:
    """Return how far the neighbours of states (..., N) that can be stored are from them at most."""
    relative, absolute = (0.0, 1.0) if np.dtype(dtype).kind == "i" else _spacing(dtype)
    step: np.ndarray = np.abs(values) * relative + absolute * (1.0 if scales is None else scales[..., None])
    return step


def _spacing(dtype: str) -> tuple[float, float]:
    info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return float(info.eps), float(info.smallest_subnormal)


def rounded(values: np.ndarray, dtype: str, words: np.ndarray | None = None) -> np.ndarray:
    """Round float32 values to a dtype: to nearest even, or stochastically with a random word (uint32) for each.

    With lo <= |v| < hi the neighbours of |v| in the dtype, it is hi if floor((|v| - lo) / (hi - lo) * 2**24) is more
    than the word's upper 24 bits, else lo. A finite number becomes none that is infinite or out of range.
    """
    # A value beyond the dtype's range becomes infinite, as everywhere.
    with np.errstate(over="ignore", invalid="ignore"):
        to_nearest = np.asarray(nearest(np, values, dtype).astype(dtype))
        if words is None:
            return to_nearest
        magnitude = np.minimum(np.nan_to_num(np.abs(values.astype(np.float64))), _largest(dtype))
        below, above = _neighbours(magnitude, np.dtype(dtype))
        lo, hi = below.astype(np.float64), above.astype(np.float64)
        # Of the largest number hi is none, and the fraction 0 or none.
        up = np.floor((magnitude - lo) / (hi - lo) * 2**24) > (words >> np.uint32(8))
        result = np.where(up, above, below)
    return np.where(np.isfinite(values), np.where(np.signbit(values), -result, result), to_nearest)


def _neighbours(magnitude: np.ndarray, dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the neighbours of numbers from 0 to the largest of a dtype: lo, and hi that is above."""
    if dtype.kind == "i":
        lo = np.floor(magnitude).astype(dtype)
        return lo, lo + dtype.type(1)
    bits = magnitude.astype(dtype).view(f"u{dtype.itemsize}")  # positive floats are ordered as their bits are
    bits = bits - (bits.view(dtype).astype(np.float64) > magnitude).astype(bits.dtype)
    return bits.view(dtype), (bits + np.ones_like(bits)).view(dtype)


def _largest(dtype: str) -> float:
    return LARGEST[dtype] if dtype in LARGEST else float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


def philox(counter: Any, key: tuple[int, int], rounds: int = 10) -> np.ndarray:
    """Return the random words of Philox-4x32 (Salmon et al., SC 2011, doi:10.1145/2063384.2063405).

    Args:
        counter: four arrays or numbers of 32 bits, broadcast against each other.
        key: two numbers of 32 bits.
        rounds: how many; 10 are usual.

    Returns:
        (4, ...) uint32.
    """
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, np.uint64) for c in counter))
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        high0, high1 = product0 >> np.uint64(32), product1 >> np.uint64(32)
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), product1 & low, high0 ^ c3 ^ np.uint64(k1), product0 & low
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def slot_words(
    slot: int, shape: tuple[int, ...], token: int, kind: int, key: tuple[int, int], rounds: int
) -> np.ndarray:
    """Return the random words for the elements of one slot.

    Args:
        slot: of the state, or entry of the intermediate states.
        shape: (nheads, headdim, dstate) of a slot.
        token: whose state is stored, counted within its sequence.
        kind: 0 for the state, 1 for intermediate states.
        key, rounds: as in :func:`philox`.

    Returns:
        uint32 of that shape. Element e of the whole array has word e % 4 of the block of counter (e // 4, token, kind).
    """
    count = int(np.prod(shape))
    first = slot * count
    blocks = np.arange(first // 4, (first + count + 3) // 4, dtype=np.uint64)
    words = philox((blocks & np.uint64(0xFFFFFFFF), blocks >> np.uint64(32), token, kind), key, rounds)
    return words.T.reshape(-1)[first % 4 :][:count].reshape(shape)


def key_of(seed: np.ndarray) -> tuple[int, int]:
    """Return the two words of a seed, one int64 or two uint32."""
    low, high = np.ascontiguousarray(seed).reshape(-1).view(np.uint32)
    return int(low), int(high)
