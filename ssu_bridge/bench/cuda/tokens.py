"""GPU times of calls of several tokens, of states in fewer bits, and of verification with a slot for each token."""

import importlib.util
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from ssu_bridge.bench.cuda.steps import Call, Steps
from ssu_bridge.bench.cuda.timing import graph_times
from ssu_bridge.bench.figures import Figures, Point
from ssu_bridge.bench.timing import Timing, microseconds
from ssu_bridge.progress import progress, say

_BATCHES = (16, 64, 256)
_TOKENS = (1, 2, 4, 8, 16)
_FLOATS = (torch.bfloat16, torch.float32)
_QUANTISED = (torch.int8, torch.float8_e4m3fn, torch.int16)
# Of which the forms differ, and which FlashInfer runs too.
_CURVES = ("triton", "triton, loop", "triton, rounded each", "flashinfer")


class _Row(NamedTuple):
    """One line of the table."""

    dtype: torch.dtype
    batch: int
    tokens: int
    slots_each: int

    def __str__(self) -> str:
        kind = "packed, a slot each" if self.slots_each > 1 else "tokens"
        return f"{self.batch}, {self.tokens} {kind}, {str(self.dtype).removeprefix('torch.')}"


def main() -> Figures:
    """Print a row for each dtype of the state, batch and number of tokens.

    Returns:
        The times of the largest batch over the number of tokens.
    """
    rows = list(_rows())
    with_flashinfer = importlib.util.find_spec("flashinfer") is not None
    if with_flashinfer:
        with ThreadPoolExecutor() as pool:  # it compiles a module with nvcc for each
            list(pool.map(_compile, [row for row in rows if row.batch == _BATCHES[0] and row.dtype in _FLOATS]))
        torch.cuda.synchronize()
    print("one call, us, H 64, P 64, N 128, G 8, x bfloat16, CUDA graph, states cold in cache: median (quartiles)")
    columns = "".join(f"{curve:<26}" for curve in _CURVES)
    print(f"{'':<36}{columns}{'of one token':>13}{'flashinfer / triton':>21}")
    points: list[Point] = []
    one: dict[tuple[torch.dtype, int], float] = {}
    for row in progress(rows, label=str):
        times = _times(row, with_flashinfer)
        ours = times["triton"].median
        if row.tokens == 1:
            one[row.dtype, row.batch] = ours
        cells = "".join(f"{microseconds(times[curve]) if curve in times else '':<26}" for curve in _CURVES)
        ratio = f"{times['flashinfer'].median / ours:.3f}" if "flashinfer" in times else ""
        say(f"{row!s:<36}{cells}{ours / one[row.dtype, row.batch]:>13.3f}{ratio:>21}")
        if row.batch == _BATCHES[-1] and row.slots_each == 1 and row.dtype in _FLOATS:
            panel = f"{str(row.dtype).removeprefix('torch.')} state"
            points += [Point.of(panel, curve, row.tokens, time) for curve, time in times.items()]
    title = f"One call of several tokens on {torch.cuda.get_device_name()}, batch {_BATCHES[-1]}"
    return Figures(title, "tokens", tuple(points))


def _rows() -> Iterator[_Row]:
    for dtype, batch, tokens in itertools.product((*_FLOATS, *_QUANTISED), _BATCHES, _TOKENS):
        yield _Row(dtype, batch, tokens, 1)
    for dtype, batch, tokens in itertools.product(_FLOATS, _BATCHES, (4, 8)):
        yield _Row(dtype, batch, tokens, tokens)


def _compile(row: _Row) -> None:
    _steps(row, cold=0).updates(backend="flashinfer")[0]()


def _times(row: _Row, with_flashinfer: bool) -> dict[str, Timing]:
    steps = _steps(row)
    calls: dict[str, list[Call]] = {"triton": [*steps.updates()]}
    if row.tokens > 1:
        calls["triton, loop"] = [*steps.updates(algorithm="loop")]
        calls["triton, rounded each"] = [*steps.updates(algorithm="loop", round_each_token=True)]
    if with_flashinfer and row.dtype in _FLOATS:
        calls["flashinfer"] = [*steps.updates(backend="flashinfer")]
    times = graph_times(calls)
    del steps, calls
    torch.cuda.empty_cache()
    return times


def _steps(row: _Row, cold: int = 10) -> Steps:
    return Steps(row.batch, row.dtype, cold, None if row.tokens == 1 else row.tokens, slots_each=row.slots_each)
