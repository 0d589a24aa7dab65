"""The benchmark of the triton backend: against copies of the state, FlashInfer and xla, and the cost of a call."""

import argparse
import importlib.util
import itertools
import statistics
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import NamedTuple

import torch

from ssu_bridge import update
from ssu_bridge.bench.cuda import devices, flashinfer_calls, jax_loops, prompts, replay, tokens, tune
from ssu_bridge.bench.cuda.steps import COPIES, Steps
from ssu_bridge.bench.cuda.timing import graph_times, host_times
from ssu_bridge.bench.figures import Figures, Point
from ssu_bridge.bench.timing import Timing, microseconds
from ssu_bridge.config import FLASHINFER_ALGORITHMS
from ssu_bridge.progress import progress, say


def main(arguments: argparse.Namespace) -> Figures | None:
    """Run the benchmark, or a part of it, by the arguments that ``command`` has parsed.

    Returns:
        The times of a step over the batch or of a call over its tokens, if these were measured.
    """
    print(
        f"{torch.cuda.get_device_name()}; torch {torch.__version__}; {_versions('triton', 'jax', 'flashinfer-python')}"
    )
    if arguments.tune:
        tune.main(arguments.batches, arguments.dtypes)
        return None
    if arguments.tokens:
        over_tokens = tokens.main()
        print()
        prompts.main(arguments.ssd)
        return over_tokens
    if arguments.prompts:
        prompts.main(arguments.ssd)
        return None
    if arguments.replay:
        return replay.main(arguments.batches)
    if arguments.devices is not None:
        devices.main(arguments.devices, arguments.batches)
        return None
    figures = _print_steps(arguments.batches, arguments.dtypes)
    jax_loops.print_loops([batch for batch in arguments.batches if batch <= 256])
    _print_torch_host()
    jax_loops.print_host()
    if importlib.util.find_spec("flashinfer"):
        print()
        flashinfer_calls.main()
    return figures


def _versions(*packages: str) -> str:
    installed = [p for p in packages if importlib.util.find_spec(p.removesuffix("-python"))]
    return "; ".join(f"{package} {metadata.version(package)}" for package in installed)


class _Row(NamedTuple):
    batch: int
    dtype: str
    state_bytes: int
    all_bytes: int
    times: dict[str, Timing]

    def best(self, names: Iterable[str]) -> str:
        return min((name for name in names if name in self.times), key=lambda name: self.times[name].median)


def _print_steps(batches: list[int], dtypes: list[str]) -> Figures:
    """Print GPU times of one step, and of the copies that bound it."""
    algorithms = FLASHINFER_ALGORITHMS if importlib.util.find_spec("flashinfer") else ()
    _compile_flashinfer(dtypes, algorithms)
    print("one step, us, H 64, P 64, N 128, G 8, CUDA graph, states cold in cache: median (quartiles)")
    print(f"{'':<18}{'triton':<26}{'FlashInfer, its best':<38}{'ratio':>6}  a copy of as many bytes")
    rows = []
    for dtype, batch in progress(list(itertools.product(dtypes, batches)), label=lambda at: f"{at[1]}, {at[0]}"):
        rows.append(_measure(batch, dtype, algorithms))
        _print_row(rows[-1], algorithms)
    bandwidth = max(2 * row.state_bytes / row.times[row.best(COPIES)].median for row in rows)
    print(f"\nall bytes of a step over its time, of the best bandwidth of a copy, {bandwidth / 1e12:.3f} TB/s:")
    for row in rows:
        if row.batch >= 256:
            share = row.all_bytes / row.times["triton"].median / bandwidth
            print(f"  {f'{row.batch}, {row.dtype}':<18}{share:.1%}")
    if algorithms:
        ratios = [row.times[row.best(algorithms)].median / row.times["triton"].median for row in rows]
        print(
            f"FlashInfer's best over triton: geometric mean {statistics.geometric_mean(ratios):.3f}, "
            f"{min(ratios):.3f} to {max(ratios):.3f}"
        )
    print()
    return _figures(rows, algorithms)


def _figures(rows: list[_Row], algorithms: tuple[str, ...]) -> Figures:
    points = []
    for row in rows:
        curves = {"triton": "triton", "copy of the state": row.best(COPIES)}
        if algorithms:
            curves["FlashInfer, its best"] = row.best(algorithms)
        points += [Point.of(f"{row.dtype} state", curve, row.batch, row.times[n]) for curve, n in curves.items()]
    return Figures(f"One step on {torch.cuda.get_device_name()}", "batch", tuple(points))


def _measure(batch: int, dtype: str, algorithms: tuple[str, ...]) -> _Row:
    steps = Steps(batch, getattr(torch, dtype))
    functions = {"triton": steps.updates(), **steps.copies()}
    functions |= {name: steps.flashinfer(name) for name in algorithms}
    row = _Row(batch, dtype, steps.state_bytes, steps.bytes(), graph_times(functions))
    del steps, functions
    torch.cuda.empty_cache()
    return row


def _print_row(row: _Row, algorithms: tuple[str, ...]) -> None:
    ours, copy = row.times["triton"], row.best(COPIES)
    line = f"{f'{row.batch}, {row.dtype}':<18}{microseconds(ours):<26}"
    if algorithms:
        theirs = row.best(algorithms)
        line += f"{f'{microseconds(row.times[theirs])} {theirs}':<38}{row.times[theirs].median / ours.median:>6.3f}"
    say(f"{line}  {microseconds(row.times[copy])} {copy}")


def _compile_flashinfer(dtypes: list[str], algorithms: tuple[str, ...]) -> None:
    """Compile FlashInfer's modules side by side: each takes its nvcc 25 to 70 s."""

    def compile_one(dtype: str) -> None:
        steps = Steps(2, getattr(torch, dtype), cold=0)
        for algorithm in algorithms:
            steps.flashinfer(algorithm)[0]()

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, dtypes if algorithms else ()))
    torch.cuda.synchronize()


def _print_torch_host() -> None:
    steps = Steps(1, torch.bfloat16, cold=0)
    state, a = steps.state, steps.calls[0]
    out = a["out"]

    def call_update() -> None:
        update(
            state, a["x"], a["dt"], a["A"], a["B"], a["C"],
            D=a["D"], dt_bias=a["dt_bias"], dt_softplus=True, state_batch_indices=a["state_batch_indices"], out=out,
        )  # fmt: skip

    def call_add() -> None:
        out.add_(a["x"])

    print("host time of an eager Torch call, batch 1, ten tensors")
    for name, timing in host_times({"update": call_update, "Tensor.add_, for comparison": call_add}).items():
        print(f"  {name:<54}{timing!s}")
