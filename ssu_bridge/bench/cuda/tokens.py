"""GPU times of calls of several tokens and of states in fewer bits, on both backends for GPUs in turn."""

import importlib.util
import itertools
from concurrent.futures import ThreadPoolExecutor

import torch

from ssu_bridge.bench.cuda.steps import Steps
from ssu_bridge.bench.cuda.timing import graph_times
from ssu_bridge.bench.timing import Timing, microseconds
from ssu_bridge.progress import progress, say

_BATCHES = (16, 64, 256)
_TOKENS = (1, 4, 8)
_DTYPES = (torch.bfloat16, torch.float32, torch.int8, torch.int16)
# Measured on FlashInfer as well; it compiles a module with nvcc for each.
_FLASHINFER = tuple(itertools.product((torch.bfloat16, torch.float32), (4, 8)))


def main() -> None:
    """Print a row for each dtype of the state, number of tokens and batch."""
    both = importlib.util.find_spec("flashinfer") is not None
    if both:
        with ThreadPoolExecutor() as pool:
            list(pool.map(_compile, _FLASHINFER))
        torch.cuda.synchronize()
    print("one call, us, H 64, P 64, N 128, G 8, x bfloat16, CUDA graph, states cold in cache: median (quartiles)")
    print(f"{'':<28}{'triton':<28}{'flashinfer':<28}flashinfer / triton")
    for dtype, tokens, batch in progress(list(itertools.product(_DTYPES, _TOKENS, _BATCHES))):
        backends = ["triton", "flashinfer"] if both and (dtype, tokens) in _FLASHINFER else ["triton"]
        times = _times(batch, dtype, tokens, backends)
        name = f"{batch}, {tokens} token{'s' * (tokens > 1)}, {str(dtype).removeprefix('torch.')}"
        line = f"{name:<28}" + "".join(f"{microseconds(times[backend]):<28}" for backend in backends)
        ratio = f"{times['flashinfer'].median / times['triton'].median:.3f}" if len(backends) > 1 else ""
        say(line + ratio)


def _compile(point: tuple[torch.dtype, int]) -> None:
    dtype, tokens = point
    Steps(1, dtype, cold=0, tokens=tokens).updates(backend="flashinfer")[0]()


def _times(batch: int, dtype: torch.dtype, tokens: int, backends: list[str]) -> dict[str, Timing]:
    steps = Steps(batch, dtype, tokens=tokens)
    times = graph_times({backend: steps.updates(backend=backend) for backend in backends})
    del steps
    torch.cuda.empty_cache()
    return times
