"""GPU times of calls in CUDA graphs, which exclude host time, and host times."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ssu_bridge.bench.timing import Timing, summary

# Few calls in a graph would measure the gap between graphs.
_LEAST_CALLS = 8


def graph_times(functions: Mapping[str, Sequence[Callable[[], object]]], *, rounds: int = 15) -> dict[str, Timing]:
    """Time calls on the GPU, in turn, round after round.

    Args:
        functions: lists of calls by name. The calls of a list are captured into one graph, one after the other; each
            should touch other memory than those before it, so that it finds nothing in the cache.
        rounds: how often each graph is replayed.

    Returns:
        The time of one call.
    """
    graphs = {name: _captured(calls) for name, calls in functions.items()}
    events = {name: [(_event(), _event()) for _ in range(rounds)] for name in graphs}
    for i in range(rounds):
        for name, (graph, _) in graphs.items():
            before, after = events[name][i]
            before.record()
            graph.replay()
            after.record()
    torch.cuda.synchronize()
    result = {}
    for name, (_, count) in graphs.items():
        samples = [before.elapsed_time(after) / 1e3 / count for before, after in events[name]]
        result[name] = summary(samples)
    return result


def host_times(functions: dict[str, Callable[[], Any]]) -> dict[str, Timing]:
    """Time the host's side of calls: few enough of them at a time for the GPU's queue, which is drained in between."""

    def draining(function: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(100):
                function()
            return (time.perf_counter() - started) / 100

        return run

    samples: dict[str, list[float]] = {name: [] for name in functions}
    runs = {name: draining(function) for name, function in functions.items()}
    for _ in range(60):
        for name, run in runs.items():
            samples[name].append(run())
    return {name: summary(values) for name, values in samples.items()}


def _captured(calls: Sequence[Callable[[], object]]) -> tuple[torch.cuda.CUDAGraph, int]:
    calls = [*calls] * -(-_LEAST_CALLS // len(calls))
    # What is compiled or loaded at a first call is not to be captured.
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph, len(calls)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
