"""What the users of a server see: requests arrive at random, and the scheduler's answers are timed.

Arrivals are a Poisson process; prompts and the tokens that are wanted have random lengths. The clock stands still while
nobody is there: it counts the time in which the scheduler works, and goes on to the next arrival when it has nothing to
do. Schedulers that are compared take turns, so that whatever else the machine does slows all of them.
"""

import collections
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Mapping

import numpy as np

from mamba2_jax.config import Mamba2Config
from mamba2_jax.model import Weights
from mamba2_jax.requests import Sequence
from mamba2_jax.scheduler import Scheduler
from mamba2_jax.speculate import Speculation
from ssu_bridge.progress import progress

# The shortest and longest prompts and answers.
PROMPTS, ANSWERS = (16, 512), (16, 128)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, how many tokens are wanted, and when it arrives, in seconds."""

    prompt: tuple[int, ...]
    count: int
    arrives: float


def requests(text: list[int], count: int, rate: float) -> list[Request]:
    """Return requests with pieces of a text as prompts: so many a second on the average, all at once if it is infinite.

    Equal arguments give equal requests, and another rate the same ones at other times.
    """
    rng = np.random.default_rng(0)
    arrivals = np.cumsum(rng.exponential(size=count)) / rate
    endless = np.resize(np.array(text), len(text) + PROMPTS[1])
    found = []
    for arrives in arrivals:
        start, length, wanted = (rng.integers(*span, endpoint=True) for span in ((0, len(text) - 1), PROMPTS, ANSWERS))
        found.append(Request(tuple(endless[start : start + length].tolist()), int(wanted), float(arrives)))
    return found


@dataclasses.dataclass(frozen=True)
class Served:
    """What came of a run.

    Attributes:
        first: seconds from the arrival of each request to its first token.
        later: seconds for each token after that, per request.
        tokens: drawn in all.
        seconds: from the first arrival to the last token.
    """

    first: list[float]
    later: list[float]
    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def __str__(self) -> str:
        return (
            f"{self.rate:8.1f} tokens/s; first token {milliseconds(self.first, 50)} (99 %: "
            f"{milliseconds(self.first, 99)}), each later one {milliseconds(self.later, 50)} (99 %: "
            f"{milliseconds(self.later, 99)})"
        )


def milliseconds(seconds: list[float], percentile: float) -> str:
    """Return a percentile in milliseconds, as text."""
    return f"{1e3 * np.percentile(seconds, percentile):.1f} ms"


class _Run:
    """A scheduler under load, with a clock of its own."""

    def __init__(self, scheduler: Scheduler, arriving: list[Request]):
        self._scheduler, self._clock, self._began = scheduler, 0.0, arriving[0].arrives
        self._arriving = collections.deque(arriving)
        self._arrived: dict[Sequence, float] = {}
        self._first: dict[Sequence, float] = {}
        self._last: dict[Sequence, float] = {}

    @property
    def is_done(self) -> bool:
        return not self._arriving and all(sequence.done for sequence in self._arrived)

    def advance(self) -> None:
        """Submit what has arrived by now, and have the scheduler advance once."""
        if all(sequence.done for sequence in self._arrived) and self._arriving:
            self._clock = max(self._clock, self._arriving[0].arrives)
        while self._arriving and self._arriving[0].arrives <= self._clock:
            request = self._arriving.popleft()
            sequence = Sequence(list(request.prompt), request.count, seed=len(self._arrived))
            self._arrived[sequence] = request.arrives
            self._scheduler.submit(sequence)
        started = time.perf_counter()
        drawn = self._scheduler.advance()
        self._clock += time.perf_counter() - started
        for sequence, _ in drawn:
            self._first.setdefault(sequence, self._clock)
            self._last[sequence] = self._clock

    def served(self) -> Served:
        later = [(self._last[sequence] - first) / (len(sequence.drawn) - 1) for sequence, first in self._first.items()]
        first = [first - self._arrived[sequence] for sequence, first in self._first.items()]
        tokens = sum(len(sequence.drawn) for sequence in self._arrived)
        return Served(first, later, tokens, self._clock - self._began)


def serve(schedulers: Mapping[str, Scheduler], arriving: list[Request]) -> dict[str, Served]:
    """Have schedulers that are free serve the same requests, and return what came of it by name."""
    runs = {name: _Run(scheduler, arriving) for name, scheduler in schedulers.items()}
    while waiting := [run for run in runs.values() if not run.is_done]:
        for run in waiting:
            run.advance()
    return {name: run.served() for name, run in runs.items()}


def compare(
    schedulers: Mapping[str, Scheduler], text: list[int], *, count: int, loads: list[float], rounds: int
) -> dict[str, list[tuple[float, Served]]]:
    """Print how so many requests are served at once, and by the load, as shares of what the last scheduler served then.

    Of several rounds the one with the median rate is shown.

    Returns:
        For each scheduler the loads in requests per second, and what came of them.
    """
    everything = requests(text, count, math.inf)
    serve(schedulers, everything)  # which compiles
    found: dict[str, list[tuple[float, Served]]] = {name: [] for name in schedulers}
    most = count / _show("all at once", schedulers, everything, rounds)[list(schedulers)[-1]].seconds
    for load in progress(loads, "load {:.0%}".format):
        rate = load * most
        by_name = _show(f"{load:.0%} load, {rate:.2f} requests/s", schedulers, requests(text, count, rate), rounds)
        for name, served in by_name.items():
            found[name].append((rate, served))
    return found


def schedulers_of(
    config: Mamba2Config,
    weights: Weights,
    *,
    width: int,
    rows: int,
    one_row: bool = False,
    speculation: Speculation | None = None,
) -> dict[str, Scheduler]:
    """Return what is compared, by name: chunks of prompts, the same with drafts, and a row for each prompt."""
    make = functools.partial(Scheduler, config, weights, width=width, rows=rows)
    found = {"chunks": make()}
    if speculation:
        found["drafts"] = make(speculation=speculation)
    if one_row:
        found["one row"] = make(one_row=True)
    return found


def _show(what: str, schedulers: Mapping[str, Scheduler], arriving: list[Request], rounds: int) -> dict[str, Served]:
    runs = [serve(schedulers, arriving) for _ in range(rounds)]
    medians = {name: sorted((run[name] for run in runs), key=lambda s: s.rate)[rounds // 2] for name in schedulers}
    print(what, flush=True)
    for name, served in medians.items():
        print(f"  {name:<12}{served}", flush=True)
    *_, reference = medians.values()
    for name, served in list(medians.items())[:-1]:
        sooner = statistics.median(reference.first) / statistics.median(served.first)
        rates = f"{served.rate / reference.rate:.2f} times the tokens/s"
        print(f"  {name}: {rates}, the first token {sooner:.1f} times as soon", flush=True)
    return medians
