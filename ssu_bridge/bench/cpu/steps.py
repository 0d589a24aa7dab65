"""One step on the cpu backend over the batch, against xla under jit and against a copy of the state."""

import functools
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ssu_bridge import update
from ssu_bridge.bench.figures import Figures, Point
from ssu_bridge.bench.timing import interleaved
from ssu_bridge.native import library
from ssu_bridge.progress import progress, say
from ssu_bridge.testing.cases import Case

BATCHES = (1, 4, 16, 64)
DTYPES = ("float32", "bfloat16")


def measure() -> Figures:
    """Print the times of a step under jit; where JAX is not installed, those of a call with NumPy arrays."""
    with_jax, threads = importlib.util.find_spec("jax") is not None, library().cpu_num_threads()
    how = "under jit" if with_jax else "of NumPy arrays"
    say(f"one step {how}, slotted cache, H 64, P 64, N 128, G 8 (the copy reads and writes the states' bytes once)")
    ratios = f"{'xla / cpu':>10}{'copy / cpu':>12}" if with_jax else f"{'copy / cpu':>12}"
    names = ("cpu", "xla") if with_jax else ("cpu",)
    say(f"{'':<20}{''.join(f'{name:<28}' for name in names)}{f'copy, {threads} threads':<28}{ratios}")
    points = []
    cases = [(batch, dtype, _decode_case(batch, dtype)) for dtype in DTYPES for batch in BATCHES]
    for batch, dtype, case in progress(cases, label=lambda item: item[-1].name):
        state = case.arrays(seed=0)["state"]
        functions = {name: _jitted(case, name) if with_jax else _of_numpy(case) for name in names}
        times = interleaved(functions | {"copy of the state": _copy(state.nbytes // 2, threads)}, rounds=21)
        cpu, *others = (timing.median for timing in times.values())
        shown = "".join(f"{timing!s:<28}" for timing in times.values())
        say(f"{case.name:<20}{shown}{''.join(f'{other / cpu:>11.2f}' for other in others)}")
        points += [Point.of(f"{dtype} state", name, batch, timing) for name, timing in times.items()]
    return Figures(f"One step {how.replace('jit', 'jax.jit')} on a CPU, {threads} threads", "batch", tuple(points))


def _decode_case(sequences: int, dtype: str) -> Case:
    """Return a step of a large Mamba-2 model on a cache with twice the slots it needs, in random order."""
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
    import jax
    import jax.numpy as jnp

    arrays = {name: jnp.array(array) for name, array in case.arrays(seed=0).items()}
    state = [arrays.pop("state")]
    step = jax.jit(functools.partial(update, **case.flags, backend=backend), donate_argnums=0)

    def run() -> None:
        out, state[0] = step(state[0], **arrays)
        out.block_until_ready()
        state[0].block_until_ready()

    return run


def _of_numpy(case: Case) -> Callable[[], object]:
    arguments: dict[str, Any] = {**case.arrays(seed=0), **case.flags}
    return functools.partial(update, **arguments, backend="cpu")


def _copy(nbytes: int, threads: int) -> Callable[[], object]:
    """Return a function that copies so many bytes from one array to another with several threads."""
    source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
    pool = ThreadPoolExecutor(threads)
    parts = [slice(i * nbytes // threads, (i + 1) * nbytes // threads) for i in range(threads)]

    def run() -> None:
        list(pool.map(lambda part: np.copyto(target[part], source[part]), parts))

    return run
