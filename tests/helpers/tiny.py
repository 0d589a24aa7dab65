"""Rows so small that the scale with which they are quantised is at the edge of what float32 holds."""

import numpy as np

from ssu_bridge.core.rounding import LARGEST

_UP, _DOWN = np.float32(np.inf), np.float32(0)


def _around(number):
    number = np.float32(number)
    return [np.nextafter(number, _DOWN), number, np.nextafter(number, _UP)]


# 0 and less than half of the least number, numbers of a few bits, those around the largest whose inverse is infinite
# and around the smallest normal one, numbers between, and one above.
SCALES = np.array(
    [
        *(0, 2.0**-151, 2.0**-149, 3 * 2.0**-149, 2.0**-140, 1.4 * 2.0**-129),
        *_around(2.0**-128),
        *(1.3 * 2.0**-128, 2.0**-127, 1.7 * 2.0**-127),
        *_around(2.0**-126),
        1.9 * 2.0**-120,
    ],
    np.float64,
)


def magnitudes(dtype):
    """The largest magnitude of a row of each scale."""
    return (SCALES * LARGEST[dtype]).astype(np.float32)


def stored_scales(dtype):
    """What has to be stored as the scale of each: 1 where its inverse would be infinite."""
    # Exact in float64 before it is rounded, once.
    scales = (magnitudes(dtype).astype(np.float64) * np.float32(1 / LARGEST[dtype])).astype(np.float32)
    return np.where(scales <= 2.0**-128, np.float32(1), scales)


def rows(dtype, columns=33):
    """A row of each scale, from its largest magnitude down to zero and up again; some elements are subnormal."""
    return magnitudes(dtype)[:, None] * np.linspace(-1, 1, columns, dtype=np.float32)
