"""The flashinfer backend against FlashInfer's own function: the host's time, and the GPU's under jit."""

from collections.abc import Callable

import torch

from ssu_bridge import update
from ssu_bridge.bench.cuda import jax_loops
from ssu_bridge.bench.cuda.steps import Steps
from ssu_bridge.bench.cuda.timing import graph_times, host_times
from ssu_bridge.bench.timing import microseconds

_BATCHES = (1, 4, 16, 64, 256)


def main() -> None:
    """Print all tables."""
    _print_host()
    _print_loops()


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
    """Print the time of a step under jit, compared with FlashInfer's own kernel in a CUDA graph."""
    print("one bfloat16 step: in a lax.fori_loop under jax.jit, and FlashInfer's kernel in a CUDA graph, us")
    for batch in _BATCHES[1:]:
        steps = Steps(batch, torch.bfloat16)
        alone = graph_times({"auto": steps.flashinfer("auto")})["auto"]
        del steps
        torch.cuda.empty_cache()
        work = jax_loops.Work(batch)
        (loop,) = jax_loops.in_turn([jax_loops.loop(work, jax_loops.cold_caches(work), "flashinfer")])
        print(
            f"  {batch:<6}{microseconds(loop):<26}{microseconds(alone):<26}{loop.median / alone.median:.3f}", flush=True
        )
    print()
