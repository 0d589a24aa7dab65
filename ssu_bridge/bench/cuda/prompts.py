"""GPU times of prompts, and of mamba_ssm's SSD kernels on the same ones, where a copy of these is given."""

import functools
import importlib
import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from ssu_bridge.bench.cuda.steps import Sizes, Steps
from ssu_bridge.bench.cuda.timing import graph_times
from ssu_bridge.bench.timing import microseconds
from ssu_bridge.progress import progress, say

# Sequences, and the tokens of each.
_PROMPTS = ((1, 512), (1, 2048), (1, 8192), (8, 512), (8, 2048))
_LAYERS = (Sizes(80, 64, 128, 1), Sizes(128, 64, 128, 8))
_CHUNK = 256


def main(ssd_folder: Path | None) -> None:
    """Print a row for each prompt; with a folder also the ratios to SSD and their geometric mean.

    Args:
        ssd_folder: a package folder that holds ssd_combined.py and what it imports.
    """
    ssd = None if ssd_folder is None else _ssd(ssd_folder)
    print(
        "prompts, us, P 64, N 128, x bfloat16, float32 state (SSD: no initial state, the final one returned), "
        "CUDA graph: median (quartiles)"
    )
    print(f"{'':<28}{'triton':<26}{'SSD':<26}{'SSD / triton':>12}")
    ratios = []
    for sizes, (sequences, tokens) in progress(list(itertools.product(_LAYERS, _PROMPTS))):
        steps = Steps(sequences, torch.float32, cold=0, tokens=tokens, sizes=sizes)
        calls: dict[str, Any] = {"triton": steps.updates()}
        if ssd is not None:
            calls["SSD"] = [functools.partial(_call_ssd, ssd, arguments) for arguments in steps.calls]
        times = graph_times(calls)
        name = f"{sequences} x {tokens}, H {sizes.nheads}, G {sizes.ngroups}"
        line = f"{name:<28}{microseconds(times['triton']):<26}"
        if ssd is not None:
            ratios.append(times["SSD"].median / times["triton"].median)
            line += f"{microseconds(times['SSD']):<26}{ratios[-1]:>12.3f}"
        say(line)
        del steps, calls
        torch.cuda.empty_cache()
    if ratios:
        mean = statistics.geometric_mean(ratios)
        print(f"SSD over triton: geometric mean {mean:.3f}, {min(ratios):.3f} to {max(ratios):.3f}")


def _ssd(folder: Path) -> Any:
    """Return SSD's function from a copy of its package."""
    if not (folder / "ssd_combined.py").is_file():
        raise SystemExit(f"--ssd: expected a folder with ssd_combined.py, found none in {folder}")
    sys.path.insert(0, str(folder.resolve().parent))
    return importlib.import_module(f"{folder.resolve().name}.ssd_combined").mamba_chunk_scan_combined


def _call_ssd(ssd: Any, a: dict[str, Any]) -> None:
    given = (a["x"], a["dt"], a["A"], a["B"], a["C"], _CHUNK)
    ssd(*given, D=a["D"], dt_bias=a["dt_bias"], dt_softplus=True, return_final_states=True, state_dtype=torch.float32)
