"""The flashinfer backend against FlashInfer's own function: the host's time, the GPU's under jit, and many tokens."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from ssu_bridge import update
from ssu_bridge.bench import cuda_jax
from ssu_bridge.bench.cuda_steps import Steps
from ssu_bridge.bench.cuda_timing import graph_times, host_times
from ssu_bridge.bench.timing import Timing

_TOKENS = {"bfloat16": (1, 2, 4, 8), "float32": (4, 8)}
_BATCHES = (1, 4, 16, 64, 256)


def main() -> None:
    """Print all tables."""
    _print_host()
    _print_loops()
    _print_tokens()


def _print_host() -> None:
    steps = Steps(1, torch.bfloat16, cold=0)
    a, state = steps.calls[0], steps.state

    def call(backend: str) -> Callable[[], None]:
        def run() -> None:
            update(
                state, a["x"], a["dt"], a["A"], a["B"], a["C"],
                D=a["D"], dt_bias=a["dt_bias"], dt_softplus=True, state_batch_indices=a["state_batch_indices"],
                out=a["out"], backend=backend,
            )  # fmt: skip

        return run

    from flashinfer.mamba import selective_state_update

    views = steps.views(a)

    def call_flashinfer(views: dict[str, torch.Tensor]) -> None:
        selective_state_update(
            state, a["x"], views["dt"], views["A"], a["B"], a["C"], D=views["D"], dt_bias=views["dt_bias"],
            dt_softplus=True, state_batch_indices=a["state_batch_indices"], out=a["out"],
        )  # fmt: skip

    functions = {
        "update, flashinfer": call("flashinfer"),
        "update, triton": call("triton"),
        "FlashInfer's own function, its views made before": lambda: call_flashinfer(views),
        "FlashInfer's own function, dt's view made in the call": lambda: call_flashinfer(views | steps.view_of_dt(a)),
        "FlashInfer's own function, its views made in the call": lambda: call_flashinfer(steps.views(a)),
    }
    times = host_times(functions)
    print("host time of an eager Torch call, batch 1, ten tensors")
    ours = times["update, flashinfer"].median
    for name, timing in times.items():
        print(f"  {name:<54}{timing!s}  {timing.median / ours:.2f}")
    print()


def _print_loops() -> None:
    """Print what a step takes under jit, beside FlashInfer's own kernel without any host."""
    print("one bfloat16 step: in a lax.fori_loop under jax.jit, and FlashInfer's kernel in a CUDA graph, us")
    for batch in _BATCHES[1:]:
        steps = Steps(batch, torch.bfloat16)
        alone = graph_times({"auto": steps.flashinfer("auto")})["auto"]
        del steps
        torch.cuda.empty_cache()
        loop = cuda_jax.loop_time(batch, cuda_jax.cold_caches(batch), "flashinfer")
        print(f"  {batch:<6}{_us(loop):<26}{_us(alone):<26}{loop.median / alone.median:.3f}", flush=True)
    print()


def _print_tokens() -> None:
    """Print the GPU's time for many tokens in a call: what the order in which auto asks is taken from."""
    print("many tokens in a call, CUDA graph, states cold in cache, us")
    points = [(getattr(torch, dtype), tokens) for dtype, several in _TOKENS.items() for tokens in several]
    with ThreadPoolExecutor() as pool:  # each module takes its nvcc half a minute
        list(pool.map(lambda point: Steps(1, point[0], 0, point[1]).updates(backend="flashinfer")[0](), points))
    print(f"{'':<30}{'triton':<28}{'flashinfer':<28}flashinfer / triton")
    for (dtype, tokens), batch in itertools.product(points, _BATCHES):
        steps = Steps(batch, dtype, tokens=tokens)
        times = graph_times({backend: steps.updates(backend=backend) for backend in ("triton", "flashinfer")})
        ours, theirs = times["triton"], times["flashinfer"]
        label = f"{batch}, {tokens} tokens, {str(dtype).removeprefix('torch.')}"
        print(f"{label:<30}{_us(ours):<28}{_us(theirs):<28}{theirs.median / ours.median:.3f}", flush=True)
        del steps
        torch.cuda.empty_cache()


def _us(timing: Timing) -> str:
    return f"{timing.median * 1e6:.2f} ({timing.lower * 1e6:.2f}-{timing.upper * 1e6:.2f})"
