"""The benchmark of the cpu backend: against xla under jit, against a copy of the state, and the cost of a call."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssu_bridge import update
from ssu_bridge.bench.cpu import calls, sharded
from ssu_bridge.bench.figures import Figures, Point
from ssu_bridge.bench.jax_calls import eager_calls, ratios
from ssu_bridge.bench.timing import Timing, interleaved
from ssu_bridge.native import library
from ssu_bridge.progress import progress, say
from ssu_bridge.testing.cases import Case

BATCHES = (1, 4, 16, 64)
DTYPES = ("float32", "bfloat16")


def main() -> Figures:
    """Run the whole benchmark and print its tables; return the times of a step over the batch."""
    native = library()
    print(f"cpu backend: {native.cpu_isa()}, {native.cpu_num_threads()} threads; jax {jax.__version__}")
    print("times are medians with quartiles; the rows of a table were measured in turn, round after round\n")
    figures = _print_jit()
    _print_jax_host()
    _print_torch_host()
    _print_calls()
    return figures


def _decode_case(sequences: int, dtype: str) -> Case:
    """A step of a large Mamba-2 model on a cache with twice the slots it needs, in random order."""
    slots = np.random.default_rng(0).permutation(2 * sequences)[:sequences]
    return Case(
        f"batch {sequences}, {dtype}",
        sequences=sequences,
        slots=2 * sequences,
        nheads=64,
        headdim=64,
        dstate=128,
        ngroups=8,
        dtypes={"state": dtype},
        absent=("z",),
        indices=tuple(map(int, slots)),
    )


def _jitted(case: Case, backend: str) -> Callable[[], object]:
    """Return a function that runs one jitted step in place and waits for it."""
    arrays = {name: jnp.array(array) for name, array in case.arrays(seed=0).items()}
    state = [arrays.pop("state")]
    step = jax.jit(functools.partial(update, **case.flags, backend=backend), donate_argnums=0)

    def run() -> None:
        out, state[0] = step(state[0], **arrays)
        out.block_until_ready()
        state[0].block_until_ready()

    return run


def _copy(nbytes: int, threads: int) -> Callable[[], object]:
    """Return a function that copies so many bytes from one array to another with several threads."""
    source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
    pool = ThreadPoolExecutor(threads)
    parts = [slice(i * nbytes // threads, (i + 1) * nbytes // threads) for i in range(threads)]

    def run() -> None:
        list(pool.map(lambda part: np.copyto(target[part], source[part]), parts))

    return run


def _print_jit() -> Figures:
    print(
        "one step under jit, slotted cache, H 64, P 64, N 128, G 8 (the copy reads and writes the states' bytes once)"
    )
    threads = library().cpu_num_threads()
    print(f"{'':<20}{'cpu':<28}{'xla':<28}{f'copy, {threads} threads':<28}{'xla / cpu':>10}{'copy / cpu':>12}")
    points = []
    cases = [(batch, dtype, _decode_case(batch, dtype)) for dtype in DTYPES for batch in BATCHES]
    for batch, dtype, case in progress(cases, label=lambda item: item[-1].name):
        state = case.arrays(seed=0)["state"]
        functions = {backend: _jitted(case, backend) for backend in ("cpu", "xla")}
        times = interleaved(functions | {"copy of the state": _copy(state.nbytes // 2, threads)}, rounds=21)
        cpu, xla, copy = times.values()
        say(
            f"{case.name:<20}{cpu!s:<28}{xla!s:<28}{copy!s:<28}"
            f"{xla.median / cpu.median:>10.1f}{copy.median / cpu.median:>12.2f}"
        )
        points += [Point.of(f"{dtype} state", name, batch, timing) for name, timing in times.items()]
    print()
    return Figures(f"One step under jax.jit on a CPU, {threads} threads", "batch", tuple(points))


def _tiny_arrays() -> dict[str, Any]:
    return Case("tiny", sequences=1, slots=1, nheads=2, headdim=4, dstate=8, ngroups=1, indices=(0,)).arrays(seed=0)


def _print_jax_host() -> None:
    jax_calls, _ = eager_calls({name: jnp.array(array) for name, array in _tiny_arrays().items()})
    times = interleaved(jax_calls, rounds=200, seconds=0.004)
    _print_rows("host time of an eager JAX call, ten arrays, a tiny problem, state donated", times)
    print(f"  {ratios({name: timing.median for name, timing in times.items()})}\n")


def _print_torch_host() -> None:
    import torch

    from ssu_bridge.bench.cpu import torch_calls

    a: dict[str, Any] = {name: torch.from_numpy(array) for name, array in _tiny_arrays().items()}
    out = torch.empty_like(a["x"])
    functions: dict[str, Callable[[], object]] = {
        "update": functools.partial(update, **a, dt_softplus=True, out=out),
        "Tensor.add_, for comparison": functools.partial(out.add_, a["x"]),
    }
    times = interleaved(functions, rounds=200, seconds=0.004)
    _print_rows(f"host time of an eager Torch call, eleven tensors, a tiny problem; torch {torch.__version__}", times)
    times = interleaved(torch_calls.problems_in_turn(), rounds=200, seconds=0.004)
    one, *_ = times.values()
    rows = {f"{name} ({timing.median / one.median:.2f})": timing for name, timing in times.items()}
    _print_rows(f"\nhost time of {torch_calls.PROBLEMS} eager Torch calls, and the ratio to one problem's", rows)
    times = interleaved(torch_calls.drop_ins(), rounds=200, seconds=0.004)
    alike = {name: times["update, out given" if name.endswith("out given") else "update"] for name in times}
    rows = {f"{name} ({timing.median / alike[name].median:.2f})": timing for name, timing in times.items()}
    _print_rows("\nhost time of an eager call of a drop-in, and the ratio to update's on the same tensors", rows)


def _print_calls() -> None:
    tiny, devices = _tiny_arrays(), sharded.DEVICES
    _print_rows("\nhost time of calls with NumPy arrays, ten arrays, a tiny problem", calls.numpy_calls(tiny))
    _print_rows("\ntime of first calls, which trace and compile", calls.first_calls(tiny))
    _print_rows(f"\ntime of first calls on a state sharded over {devices} virtual devices", sharded.first_calls())
    _print_rows("\ntime to prepare an exported program", calls.preparations(tiny))


def _print_rows(title: str, times: dict[str, Timing]) -> None:
    print(title)
    for name, timing in times.items():
        print(f"  {name:<54}{timing!s}")
