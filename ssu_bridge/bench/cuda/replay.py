"""GPU times of a replay state: the mean over a cycle of steps and a flush, over dtypes, windows and batches."""

import importlib.util
import itertools
from collections.abc import Sequence

import torch

from ssu_bridge.bench.cuda.replay_steps import ReplaySteps
from ssu_bridge.bench.cuda.steps import Steps
from ssu_bridge.bench.cuda.timing import graph_times
from ssu_bridge.bench.figures import Figures, Point
from ssu_bridge.bench.timing import Timing, microseconds
from ssu_bridge.progress import progress, say

_WINDOW = 16
_WINDOWS = (4, 8, 16, 32)
_DTYPES = (torch.bfloat16, torch.int8, torch.float32)
# Drafts and the token after them, all accepted.
_TOKENS = 4
_TOKEN_BATCHES = (16, 64, 256)


def main(batches: Sequence[int]) -> Figures:
    """Print a row for each dtype of the checkpoint and batch, for one token a step and for several.

    Returns:
        The mean times over the batch: of each window, with a bfloat16 and an int8 checkpoint.
    """
    with_flashinfer = _has_flashinfer()
    print(f"one step, us, H 64, P 64, N 128, G 8, x bfloat16, window {_WINDOW}, CUDA graph, states cold in cache")
    print("times as fast: as the bfloat16 state in place; as FlashInfer's checkpointing_ssu")
    print(
        f"{'':<16}{'in place, bfloat16':<24}{'mean of a cycle':<24}{'a flush':<24}{'FlashInfer, mean':<24}times as fast"
    )
    points: list[Point] = []
    for batch, dtype in progress(list(itertools.product(batches, _DTYPES)), label=lambda at: f"{at[0]}, {at[1]}"):
        in_place = _in_place(batch)
        times = _replayed(batch, dtype, _WINDOW, 1, with_flashinfer and dtype != torch.float32)
        say(f"{f'{batch}, {_name(dtype)}':<16}{microseconds(in_place):<24}{_cells(times, in_place)}")
    print(f"\n{_TOKENS} tokens a step, all accepted; in place: packed, a slot for each token")
    for batch, dtype in progress(list(itertools.product(_TOKEN_BATCHES, _DTYPES[:2])), label=str):
        slots_each = graph_times({"": Steps(batch, torch.bfloat16, slots_each=_TOKENS).updates()})[""]
        times = _replayed(batch, dtype, _WINDOW, _TOKENS, with_flashinfer)
        say(f"{f'{batch}, {_name(dtype)}':<16}{microseconds(slots_each):<24}{_cells(times, slots_each)}")
    for dtype, batch in progress(list(itertools.product(_DTYPES[:2], batches)), label=str):
        points.append(Point.of(f"{_name(dtype)} checkpoint", "in place, bfloat16", batch, _in_place(batch)))
        for window in _WINDOWS:
            time = _replayed(batch, dtype, window, 1, False)["mean"]
            points.append(Point.of(f"{_name(dtype)} checkpoint", f"window {window}", batch, time))
    return Figures(f"A step of a ReplayState on {torch.cuda.get_device_name()}", "batch", tuple(points))


def _has_flashinfer() -> bool:
    if importlib.util.find_spec("flashinfer") is None:
        return False
    mamba = importlib.import_module("flashinfer.mamba")
    return hasattr(mamba, "checkpointing_ssu")


def _in_place(batch: int) -> Timing:
    return graph_times({"": Steps(batch, torch.bfloat16).updates()})[""]


def _replayed(batch: int, dtype: torch.dtype, window: int, tokens: int, with_flashinfer: bool) -> dict[str, Timing]:
    """Time a step over a cycle of phases, and one in which every sequence flushes."""
    cycle = ReplaySteps(batch, dtype, window, tokens)
    calls = {"mean": cycle.updates()} | ({"flashinfer": cycle.flashinfer()} if with_flashinfer else {})
    times = graph_times(calls)
    del cycle, calls
    torch.cuda.empty_cache()
    times |= graph_times({"flush": ReplaySteps(batch, dtype, window, tokens, phases=[window]).updates()})
    torch.cuda.empty_cache()
    return times


def _cells(times: dict[str, Timing], in_place: Timing) -> str:
    cells = "".join(
        f"{microseconds(times[name]) if name in times else '':<24}" for name in ("mean", "flush", "flashinfer")
    )
    ratios = [in_place.median / times["mean"].median]
    if "flashinfer" in times:
        ratios.append(times["flashinfer"].median / times["mean"].median)
    return cells + ", ".join(f"{ratio:.2f}" for ratio in ratios)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
