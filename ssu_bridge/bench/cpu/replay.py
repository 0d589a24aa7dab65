"""A token of a ReplayState against one of a state that is stepped in place, of NumPy arrays."""

import functools
from collections.abc import Callable
from typing import Any

from ssu_bridge import update
from ssu_bridge.bench.timing import Timing, interleaved
from ssu_bridge.core.quantized import paired
from ssu_bridge.testing.cases import Case

_WINDOW, _BATCH = 16, 16
_CHECKPOINTS = ("bfloat16", "float32", "int8")
_IN_PLACE = "in place"


def times() -> dict[str, Timing]:
    """Time steps with none, half a window and a whole window of pending tokens, with the ratio to one in place."""
    rows: dict[str, Timing] = {}
    for dtype in _CHECKPOINTS:
        steps = {_IN_PLACE: _step(dtype, 0, None), "none pending": _step(dtype, _WINDOW, 0)}
        steps |= {
            f"{_WINDOW // 2} pending": _step(dtype, _WINDOW, _WINDOW // 2),
            "a flush": _step(dtype, _WINDOW, _WINDOW),
        }
        found = interleaved(steps, rounds=15, seconds=0.02)
        for name, timing in found.items():
            ratio = f" ({timing.median / found[_IN_PLACE].median:.2f})" if name != _IN_PLACE else ""
            rows[f"{dtype}, {name}{ratio}"] = timing
    return rows


def _step(dtype: str, window: int, pending: int | None) -> Callable[[], object]:
    """Return a step that repeats the same phase: nothing advances its cursor."""
    case = Case(
        "replay",
        sequences=_BATCH,
        slots=_BATCH,
        nheads=64,
        headdim=64,
        dstate=128,
        ngroups=8,
        dtypes={"state": dtype, "*": "bfloat16", "A": "float32"},
        absent=("z",),
        indices=tuple(range(_BATCH)),
        window=window,
        starts=tuple(range(_BATCH)) if window else (),
        pending=(pending or 0,) * _BATCH if window else (),
    )
    arguments: dict[str, Any] = {**paired(case.arrays(seed=0), window), **case.flags}
    return functools.partial(update, **arguments, backend="cpu")
