"""Measures the tiles of the Triton kernel and writes the table that the triton backend chooses from."""

import re
from pathlib import Path
from typing import NamedTuple

import torch

from ssu_bridge.backends.triton import tiles
from ssu_bridge.bench.cuda.steps import LAYER, Steps
from ssu_bridge.bench.cuda.timing import graph_times
from ssu_bridge.progress import progress, say

_TABLE = Path(tiles.__file__).with_suffix(".toml")
_CANDIDATES = [(rows, warps) for warps in (2, 4, 8) for rows in (4, 8, 16, 32, 64)]
# A tile must be this much faster than the one that the next smaller work has, to be a row of its own.
_WORTH_A_ROW = 0.995


class Row(NamedTuple):
    """A row of the table: up to how much work it holds, and the tile."""

    most: float
    elements: int
    warps: int


def main(batches: list[int], dtypes: list[str]) -> None:
    """Time every tile at every batch; print the times and write this GPU's part of the table."""
    tables: dict[str, list[Row]] = {}
    for dtype in sorted(dtypes, key=lambda dtype: getattr(torch, dtype).itemsize):
        tables[f"bytes{getattr(torch, dtype).itemsize}"] = _table(batches, getattr(torch, dtype))
    major, minor = torch.cuda.get_device_capability()
    section = _section(f"sm{major}{minor}", tables)
    print(section)
    _TABLE.write_text(_replaced(_TABLE.read_text(), section))
    print(f"written to {_TABLE}")


def _table(batches: list[int], dtype: torch.dtype) -> list[Row]:
    work = [batch * LAYER.nheads * LAYER.headdim * LAYER.dstate for batch in batches]
    rows: list[Row] = []
    for i, batch in enumerate(progress(batches, label=lambda batch: f"batch {batch}, {dtype}")):
        times = _times(batch, dtype)
        best = min(times, key=lambda tile: times[tile])
        kept = (rows[-1].elements // LAYER.dstate, rows[-1].warps) if rows else best
        say(f"{batch:>5} {dtype}: best {best} {times[best]:.2f} us, {kept} {times[kept]:.2f} us")
        # Half way, on a scale of factors, to the next batch that was measured.
        most = (work[i] * work[i + 1]) ** 0.5 if i + 1 < len(work) else float("inf")
        if rows and times[best] > _WORTH_A_ROW * times[kept]:
            rows[-1] = rows[-1]._replace(most=most)
        else:
            rows.append(Row(most, best[0] * LAYER.dstate, best[1]))
    return rows


def _times(batch: int, dtype: torch.dtype) -> dict[tuple[int, int], float]:
    steps = Steps(batch, dtype)
    least = 16 // dtype.itemsize * 32  # what a warp holds in one vector a thread
    tiles = [tile for tile in _CANDIDATES if tile[0] * LAYER.dstate >= least * tile[1]]
    times = graph_times({str(tile): steps.updates(tile) for tile in tiles}, rounds=9)
    return {tile: times[str(tile)].median * 1e6 for tile in tiles}


def _section(name: str, tables: dict[str, list[Row]]) -> str:
    lines = [f"[{name}]"]
    for key, rows in tables.items():
        entries = [f"    [{_number(row.most)}, {row.elements}, {row.warps}],\n" for row in rows]
        lines.append(f"{key} = [\n{''.join(entries)}]")
    return "\n".join(lines) + "\n"


def _number(most: float) -> str:
    return "inf" if most == float("inf") else f"{int(most):_}"


def _replaced(text: str, section: str) -> str:
    """Put a section in the place of the one of its name, or at the end."""
    name = re.escape(section.split("\n", 1)[0])
    found = re.search(rf"^{name}\n(?:(?!\[sm).*\n)*", text, re.MULTILINE)
    return text[: found.start()] + section + text[found.end() :] if found else f"{text}\n{section}"
