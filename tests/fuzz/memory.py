"""Memory for arrays between pages that no one may touch: what reads or writes past an end ends the process."""

import ctypes
import mmap
from typing import NamedTuple

import numpy as np

PAGE = mmap.PAGESIZE
CANARY = 0xA5
# Bytes that a GPU loads at once.
VECTOR = 16
# What may be slices of one projection.
PROJECTED = ("x", "z", "B", "C")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Layout(NamedTuple):
    """Where an array lies in a buffer, in elements: which one, from which element on, with which strides.

    A buffer of its own has the array's name.
    """

    buffer: str
    first: int
    strides: tuple


class Buffers:
    """Buffers of memory, each with a guard page right behind its end, or right before its begin.

    Args:
        count: at most so many in a call.
        capacity: bytes of the largest.
    """

    def __init__(self, count, capacity):
        self._capacity = -(-capacity // PAGE) * PAGE
        self._slot = self._capacity + 2 * PAGE
        self._map = mmap.mmap(-1, count * self._slot)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._protect(self._base, count * self._slot, 0)

    def _protect(self, address, size, allowed):
        if _libc.mprotect(address, size, allowed):
            raise OSError(ctypes.get_errno(), "mprotect")

    def place(self, number, size, at_end):
        """Return the bytes of buffer ``number``, and among them where its ``size`` bytes lie; all others are canaries."""
        pages = max(-(-size // PAGE), 1) * PAGE
        assert pages <= self._capacity, (size, self._capacity)
        begin = self._base + number * self._slot
        self._protect(begin, self._slot, 0)
        begin += PAGE if not at_end else PAGE + self._capacity - pages
        self._protect(begin, pages, mmap.PROT_READ | mmap.PROT_WRITE)
        window = np.frombuffer((ctypes.c_uint8 * pages).from_address(begin), np.uint8)
        window[:] = CANARY
        return window, (pages - size if at_end else 0)


def placed(buffers, arrays, layouts, at_end, unit=1):
    """Put arrays into guarded memory as their layouts say; return them there by name, and the bytes by buffer.

    Args:
        buffers: of :class:`Buffers`.
        arrays: dense NumPy arrays by name.
        layouts: of each.
        at_end: of each buffer, whether it ends at a guard page or begins at one.
        unit: of how many bytes each buffer's address is a multiple; it ends so near to a guard.
    """
    windows, firsts = {}, {}
    for number, (buffer, size) in enumerate(extents(arrays, layouts).items()):
        windows[buffer], firsts[buffer] = buffers.place(number, -(-size // unit) * unit, at_end[buffer])
    views = {}
    for name, (buffer, first, strides) in layouts.items():
        array = arrays[name]
        offset = firsts[buffer] + first * array.itemsize
        steps = tuple(stride * array.itemsize for stride in strides)
        views[name] = np.ndarray(array.shape, array.dtype, windows[buffer], offset if array.size else 0, steps)
        if name in (buffer, *PROJECTED):  # an output in the place of another array leaves that one's numbers
            views[name][...] = array
    return views, windows


def extents(arrays, layouts):
    """Return how many bytes each buffer has."""
    sizes = {}
    for name, layout in layouts.items():
        array = arrays[name]
        ends = [(n - 1) * stride for n, stride in zip(array.shape, layout.strides, strict=True)] if array.size else [-1]
        assert not array.size or layout.first + sum(end for end in ends if end < 0) >= 0, (name, layout)
        size = layout.first + sum(end for end in ends if end > 0) + bool(array.size)
        sizes[layout.buffer] = max(sizes.get(layout.buffer, 0), size * array.itemsize)
    return sizes


def dense(shape):
    """Return the strides of a dense array, in elements."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.insert(0, step)
        step *= n
    return tuple(strides)
