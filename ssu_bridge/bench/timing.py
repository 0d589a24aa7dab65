"""Timing functions in turn, so that a disturbance of the machine affects all of them."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Timing(NamedTuple):
    """Seconds per call: the median of the rounds, and the quartiles around it."""

    median: float
    lower: float
    upper: float

    def __str__(self) -> str:
        unit, scale = next((u, s) for u, s in (("ms", 1e3), ("us", 1e6)) if self.median * s >= 1 or u == "us")
        return f"{self.median * scale:.1f} {unit} ({self.lower * scale:.1f} to {self.upper * scale:.1f})"


def interleaved(
    functions: Mapping[str, Callable[[], object]], *, rounds: int = 30, seconds: float = 0.01
) -> dict[str, Timing]:
    """Time functions in turn, round after round.

    Args:
        functions: what to time, by name. Each must wait for its own result.
        rounds: how often each has its turn.
        seconds: how long one turn takes, about; a function is called at least once in it.
    """
    calls = {}
    for name, function in functions.items():
        function()
        started = time.perf_counter()
        function()
        calls[name] = max(1, int(seconds / max(time.perf_counter() - started, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    gc.disable()
    try:
        for _ in range(rounds):
            for name, function in functions.items():
                turn = range(calls[name])
                started = time.perf_counter()
                for _ in turn:
                    function()
                samples[name].append((time.perf_counter() - started) / len(turn))
    finally:
        gc.enable()
    return {name: summary(values) for name, values in samples.items()}


def summary(values: list[float]) -> Timing:
    """Return the median and quartiles of samples."""
    lower, median, upper = statistics.quantiles(values, n=4)
    return Timing(median, lower, upper)


def microseconds(timing: Timing) -> str:
    """Return the median and quartiles in microseconds, for tables that give no unit."""
    return f"{timing.median * 1e6:.2f} ({timing.lower * 1e6:.2f}-{timing.upper * 1e6:.2f})"
