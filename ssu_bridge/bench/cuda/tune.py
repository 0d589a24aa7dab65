"""Measures the tiles of the Triton kernel for one token, and writes the table that the triton backend chooses from."""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from ssu_bridge import explain
from ssu_bridge.backends.triton import tiles
from ssu_bridge.bench.cuda.steps import Sizes, Steps
from ssu_bridge.bench.cuda.timing import graph_times
from ssu_bridge.progress import progress, say

_TABLE = Path(tiles.__file__).with_suffix(".toml")
# The layers of Mamba-2 models, one of them as a device of eight has it.
_LAYERS = {
    "mamba2-130m": Sizes(24, 64, 128, 1),
    "mamba2-2.7b": Sizes(80, 64, 128, 1),
    "granite4-tiny": Sizes(48, 64, 128, 1),
    "granite4-small": Sizes(128, 64, 128, 1),
    "nemotron-h-8b": Sizes(128, 64, 128, 8),
    "nemotron-h-56b": Sizes(256, 64, 256, 8),
    "nemotron-h-56b on one of 8": Sizes(32, 64, 256, 1),
    "falcon-h1-34b": Sizes(32, 128, 256, 2),
    "zamba2-7b": Sizes(112, 64, 64, 2),
}
# More elements in a thread take more registers than there are.
_CANDIDATES = [
    (elements, warps)
    for elements, warps in itertools.product((1024, 2048, 4096, 8192), (1, 2, 4, 8))
    if elements <= 2048 * warps
]
# What a row of the table has to save: the sum, over the calls that it holds, of the shares of their times.
_WORTH_A_ROW = 0.1


class Row(NamedTuple):
    """A row of the table: up to how much work it holds, and the tile."""

    most: float
    elements: int
    warps: int


class Point(NamedTuple):
    """A call: the elements of state that it updates, and its time by the elements and warps of the tile."""

    work: int
    times: dict[tuple[int, int], float]


def main(batches: list[int], dtypes: list[str]) -> None:
    """Time every tile at every batch for each layer; print the times and write this GPU's part of the table."""
    # Integers stand for all states of 8 bits.
    by_bytes = {torch.int8.itemsize: torch.int8} | {d.itemsize: d for d in (getattr(torch, name) for name in dtypes)}
    tables = {}
    for size, dtype in sorted(by_bytes.items()):
        calls = [(name, batch, dtype) for name in _LAYERS for batch in batches]
        points = [_measured(*call) for call in progress(calls, label=lambda call: ", ".join(map(str, call)))]
        tables[f"bytes{size}"] = rows_of(points)
    major, minor = torch.cuda.get_device_capability()
    _TABLE.write_text(replaced(_TABLE.read_text(), f"sm{major}{minor}", tables))
    print(f"written to {_TABLE}: {tables}")


def _measured(name: str, batch: int, dtype: torch.dtype) -> Point:
    sizes = _LAYERS[name]
    steps = Steps(batch, dtype, sizes=sizes)
    problem = explain(steps.state, **steps.calls[0]).choices[0].problem
    fitted = {candidate: tiles.fitted(problem, *candidate) for candidate in _CANDIDATES}
    updates = {str(tile): steps.updates((tile.rows, tile.warps)) for tile in fitted.values()}
    with ThreadPoolExecutor() as pool:  # each is compiled at its first call
        list(pool.map(lambda calls: calls[0](), updates.values()))
    times = graph_times(updates, rounds=9)
    point = Point(
        batch * sizes.nheads * sizes.headdim * sizes.dstate,
        {candidate: times[str(tile)].median * 1e6 for candidate, tile in fitted.items()},
    )
    best = min(point.times, key=lambda candidate: point.times[candidate])
    say(f"{name:<27}{batch:>5} {dtype}: best {best} {point.times[best]:.2f} us")
    del steps, updates
    torch.cuda.empty_cache()
    return point


def rows_of(points: Sequence[Point]) -> list[Row]:
    """Return the rows that cost least: what each call takes longer than its best tile, and something for each row."""
    points = sorted(points, key=lambda point: point.work)
    # Of the first so many points: the cost, and the rows.
    best: list[tuple[float, list[Row]]] = [(0.0, [])]
    for end in range(1, len(points) + 1):
        best.append(min(_with_last_row(points, end, best), key=lambda option: option[0]))
    rows = best[-1][1]
    return [*rows[:-1], rows[-1]._replace(most=math.inf)]


def _with_last_row(
    points: Sequence[Point], end: int, best: Sequence[tuple[float, list[Row]]]
) -> Iterator[tuple[float, list[Row]]]:
    """Yield ways to hold the first points, by where their last row starts."""
    # Half way, on a scale of factors, to the next point.
    most = math.sqrt(points[end - 1].work * points[min(end, len(points) - 1)].work)
    for start in range(end):
        held = points[start:end]
        if start and points[start - 1].work == held[0].work:
            continue
        costs = {tile: sum(_excess(point, tile) for point in held) for tile in held[0].times}
        tile = min(costs, key=lambda tile: costs[tile])
        yield best[start][0] + _WORTH_A_ROW + costs[tile], [*best[start][1], Row(most, *tile)]


def _excess(point: Point, tile: tuple[int, int]) -> float:
    return math.log(point.times[tile] / min(point.times.values()))


def replaced(text: str, gpu: str, tables: dict[str, list[Row]]) -> str:
    """Put rows in the place of those of their name in a GPU's part of the table's text; leave all others."""
    before, heading, after = text.partition(f"[{gpu}]\n")
    if not heading:
        before, heading = f"{text}\n", f"[{gpu}]\n"
    end = re.search(r"^\[|\Z", after, re.MULTILINE).start()  # type: ignore[union-attr]
    part, others = after[:end], after[end:]
    for key, rows in reversed(tables.items()):
        entries = "".join(f"    [{_number(row.most)}, {row.elements}, {row.warps}],\n" for row in rows)
        part = re.sub(rf"^{key} = \[\n(?: .*\n)*\]\n", "", part, flags=re.MULTILINE)
        part = f"{key} = [\n{entries}]\n{part}"
    return before + heading + part + others


def _number(most: float) -> str:
    return "inf" if most == math.inf else f"{int(most):_}"
