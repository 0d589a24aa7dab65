"""The load test: requests arrive as they are to, and times are those of a clock that only counts work."""

import itertools
import math

import pytest

from mamba2_jax import load
from mamba2_jax.load import Request, Served, requests, serve

TEXT = list(range(100))


class Clock:
    """A clock that goes on when a scheduler works."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(load.time, "perf_counter", lambda: self.now)


class Scheduler:
    """Draws a token for each sequence in each step, which takes a second; it has one place."""

    def __init__(self, clock):
        self.clock, self.waiting, self.submitted = clock, [], []

    def submit(self, sequence):
        self.waiting.append(sequence)
        self.submitted.append((sequence.prompt, sequence.count))

    def advance(self):
        self.clock.now += 1
        sequence = self.waiting[0]
        sequence.drawn.append(7)
        if len(sequence.drawn) == sequence.count:
            sequence.ended = "count"
            self.waiting.pop(0)
        return [(sequence, 7)]


def test_what_is_measured(monkeypatch):
    """Two arrive together, and the second waits for the first; the third comes when nobody is there."""
    clock = Clock(monkeypatch)
    arriving = [Request((1,), 3, 2.0), Request((2, 3), 2, 2.5), Request((4,), 4, 50.0)]
    schedulers = {"one": Scheduler(clock), "other": Scheduler(clock)}
    for served in serve(schedulers, arriving).values():
        assert served == Served(first=[1.0, 3.5, 1.0], later=[1.0, 1.0, 1.0], tokens=9, seconds=52.0)
        assert served.rate == 9 / 52
    assert schedulers["one"].submitted == [([1], 3), ([2, 3], 2), ([4], 4)]


def test_arrivals_are_a_poisson_process():
    found = requests(TEXT, 2000, rate=4.0)
    gaps = [b.arrives - a.arrives for a, b in itertools.pairwise(found)]
    assert sum(gaps) / len(gaps) == pytest.approx(1 / 4, rel=0.1)
    assert sum(gap > 1 / 4 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.05)
    lengths, counts = [len(r.prompt) for r in found], [r.count for r in found]
    assert (min(lengths), max(lengths)) == load.PROMPTS
    assert (min(counts), max(counts)) == load.ANSWERS
    assert all(r.prompt[0] in TEXT and r.prompt[1] == (r.prompt[0] + 1) % 100 for r in found)
    at_once = requests(TEXT, 2000, math.inf)
    assert {r.arrives for r in at_once} == {0.0}
    assert [r.prompt for r in at_once] == [r.prompt for r in found]
