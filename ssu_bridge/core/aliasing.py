"""Which arrays of a call may share memory, and which must not."""

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from ssu_bridge.core.problem import Problem

# How long to look for an element that two interleaved arrays share. Slices of one buffer take a few steps.
_MOST_WORK = 1 << 12


def needs_fresh_output(problem: Problem, arrays: Mapping[str, np.ndarray]) -> bool:
    """Check what a call writes in place against its other arrays; return whether out needs memory of its own.

    Each thread reads the elements of x and z that belong to the output that it then writes, so out may be either of
    them. Everything else is read by several threads, at any time. Packed sequences may share rows, and so read x and z
    when another has written them. A token of a tree may need the x of those that it descends from again, after their
    outputs were written.

    Args:
        problem: the description of the call.
        arrays: the arrays by name, and out if it was given. Only addresses, shapes and strides are read.

    Returns:
        Whether out shares memory with an array that is only read, otherwise than by being x or z: the output has to be
        computed elsewhere and copied.

    Raises:
        ValueError: a state or intermediate states share memory with another array.
    """
    in_place = [name for name in problem.results if name != "out"]
    for written in in_place:
        for name, array in arrays.items():
            if name != written and _overlap(arrays[written], array):
                raise ValueError(
                    f"{name}: expected memory apart from that of {written}, which is updated in place, got an overlap; "
                    "pass a copy"
                )
    if (out := arrays.get("out")) is None:
        return False
    may_be_out = () if problem.layout == "packed" else ("z",) if "parent_tokens" in problem.names else ("x", "z")
    return any(
        _overlap(out, array) and not (name in may_be_out and _same_elements(out, array))
        for name, array in arrays.items()
        if name not in ("out", *in_place)
    )


class Memory:
    """The address and strides of an array on any device, for NumPy to compare; nothing is read there."""

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int):
        # NumPy takes no null pointer, and an array without memory shares none.
        shape, strides = (shape, tuple(stride * itemsize for stride in strides)) if address else ((0,), (1,))
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (address or 1, True),
            "shape": shape,
            "strides": strides,
            "typestr": f"|V{itemsize if address else 1}",
        }


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=_MOST_WORK)  # type: ignore[arg-type]  # its stub knows no limits
    except np.exceptions.TooHardError:  # undecided: a copy or an error is right either way
        return True


def _same_elements(a: np.ndarray, b: np.ndarray) -> bool:
    steps = ([stride for n, stride in zip(c.shape, c.strides, strict=True) if n > 1] for c in (a, b))
    return a.ctypes.data == b.ctypes.data and operator.eq(*steps) and a.itemsize == b.itemsize
