"""The growth of a process's memory and of its XLA FFI targets over many calls.

python -m ssu_bridge.bench.memory
"""

import argparse
import ctypes
import functools
import gc
import itertools
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssu_bridge import update
from ssu_bridge.testing.cases import Case, arguments

_SMALL: dict[str, Any] = {"headdim": 8, "dstate": 16}
CASE = Case("one token", **_SMALL)
PROMPT = Case("a prompt", **_SMALL, tokens=64, dtypes={"*": "bfloat16", "A": "float32"})
FORMS = (
    Case("several tokens", **_SMALL, tokens=4, steps=4),
    PROMPT,
    Case("packed prompts", **_SMALL, tokens=40, cu_seqlens=(0, 8, 8, 40)),
    Case("a tree", **_SMALL, tokens=5, steps=5, parents=((-1, 0, 0, 1, 1),) * 3),
    Case("int8", **_SMALL, dtypes={"state": "int8"}),
    Case("int8, stochastic", **_SMALL, dtypes={"state": "int8"}, seed=1),
    Case("replay", **_SMALL, tokens=3, window=5, most=3, starts=(0, 7, 6, 2, 1, 4), pending=(5, 2, 1, 3, 4, 0)),
    Case("replay of int8", **_SMALL, dtypes={"state": "int8"}, window=5, starts=(0,) * 6, pending=(2,) * 6),
)
# After so many calls the process has all that it keeps; of other shapes each, caches of calls are full after these.
_WARM_UP, _WARM_UP_OF_SHAPES = 300, {"numpy": 1000, "torch": 5000, "jax": 500, "jit": 500, "plain jit": 500}
# After so many shapes JAX forgets its programs, of which it keeps as many as there are shapes.
_SHAPES_BETWEEN_CLEARING = 250
_CALLS_OF_A_LOOP = 10_000
# On a GPU, XLA keeps some bytes of each execution until a thread of its own looks, every five seconds.
_XLA_CLEANS_UP = 6.0


class Growth(NamedTuple):
    """What a number of calls added to the process.

    Attributes:
        calls: how many there were.
        at_once: by how many bytes the process's resident memory had grown when they ended.
        resident: the same after XLA had freed what the calls left, of memory that is in use: before both looks the C
            library gives free memory back, so that nothing that is kept hides in what was free before.
        device: by how many bytes JAX's memory on the device did; None where the device does not say, as a CPU.
        targets: how many XLA FFI targets there are after them.
    """

    calls: int
    at_once: int
    resident: int
    device: int | None
    targets: int


def eager(calls: int, case: Case = CASE, framework: str = "jax", algorithm: str = "auto") -> Growth:
    """Measure eager calls, each with the states of the one before."""
    given = arguments(case.arrays(seed=0), framework, _converter(framework), case.window)
    flags = {**case.flags, "algorithm": algorithm}

    def run(count: int) -> None:
        for _ in range(count):
            _, given["state"], *others = update(**given, **flags)
            given.update(zip(("intermediate_states",), others, strict=False))
        jax.block_until_ready(given["state"])  # type: ignore[no-untyped-call]

    return growth(run, calls)


def _converter(framework: str) -> Callable[[np.ndarray], Any]:
    """Return what makes an array of a framework."""
    if framework != "torch":
        return jnp.array if framework == "jax" else np.array
    import torch

    bits = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
    return lambda array: (
        torch.from_numpy(array.view(f"int{8 * array.itemsize}")).view(bits[array.dtype.name])
        if array.dtype.name in bits
        else torch.from_numpy(array)
    )


def traced(calls: int) -> Growth:
    """Measure calls inside jitted loops."""
    given = {name: jnp.array(array) for name, array in CASE.arrays(seed=0).items()}
    state = [given.pop("state")]

    @functools.partial(jax.jit, donate_argnums=0)
    def loop(state: Any, given: dict[str, Any]) -> Any:
        return jax.lax.fori_loop(0, _CALLS_OF_A_LOOP, lambda _, s: update(s, **given, **CASE.flags)[1], state)

    def run(count: int) -> None:
        for _ in range(max(count // _CALLS_OF_A_LOOP, 1)):
            state[0] = loop(state[0], given).block_until_ready()

    return growth(run, calls)


def of_jax(calls: int) -> Growth:
    """Measure, for comparison, calls of a plain jitted function that changes the same state in place."""
    arrays = {name: jnp.array(array) for name, array in CASE.arrays(seed=0).items()}
    state = [arrays.pop("state")]

    @functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
    def step(state: Any, arrays: dict[str, Any]) -> Any:
        return 0.5 * state, 2 * arrays["x"]

    def run(count: int) -> None:
        for _ in range(count):
            state[0], _ = step(state[0], arrays)
        state[0].block_until_ready()

    return growth(run, calls)


def shapes(calls: int, way: str) -> Growth:
    """Measure calls of as many shapes, in a way: "numpy", "torch", "jax", "jit", or "plain jit" without a step."""
    numbers = itertools.count()
    call = {"jit": jax.jit(_step), "plain jit": jax.jit(_plain)}.get(way, _step)
    convert = _converter(way) if way in ("numpy", "torch") else jax.device_put

    def run(count: int) -> None:
        for number in itertools.islice(numbers, count):
            jax.block_until_ready(call({name: convert(array) for name, array in _of_shape(number).items()}))  # type: ignore[no-untyped-call]
            if way not in ("numpy", "torch") and (number + 1) % _SHAPES_BETWEEN_CLEARING == 0:
                jax.clear_caches()  # type: ignore[no-untyped-call]

    return growth(run, calls, _WARM_UP_OF_SHAPES[way])


def _step(given: dict[str, Any]) -> Any:
    return update(**given)


def _plain(given: dict[str, Any]) -> Any:
    return 2 * given["x"], 0.5 * given["state"]


def _of_shape(number: int) -> dict[str, np.ndarray]:
    """Return arrays whose sizes no other number has."""
    number, b = divmod(number, 25)
    number, P = divmod(number, 20)
    b, P, H, N = b + 1, P + 1, number % 20 + 1, 4 + number // 20
    sizes = {"state": (b, H, P, N), "x": (b, H, P), "dt": (b, H), "A": (H,), "B": (b, 1, N), "C": (b, 1, N)}
    return {name: np.full(size, -0.5 if name == "A" else 0.5, "float32") for name, size in sizes.items()}


def growth(run: Callable[[int], None], calls: int, warm_up: int = _WARM_UP) -> Growth:
    """Return what ``run(calls)`` adds to the process, after a first run of some."""
    import jax_tvm_ffi

    run(warm_up)
    _clean_up()
    before, device = _resident(), _on_device()
    run(calls)
    at_once = _resident() - before
    _clean_up()
    grown = None if device is None else (_on_device() or 0) - device
    return Growth(calls, at_once, _resident() - before, grown, jax_tvm_ffi.registered_count())


def _clean_up() -> None:
    gc.collect()
    if jax.default_backend() != "cpu":
        time.sleep(_XLA_CLEANS_UP)
    ctypes.CDLL(None).malloc_trim(0)


def _resident() -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def _on_device() -> int | None:
    statistics = jax.devices()[0].memory_stats()
    return None if statistics is None else int(statistics["bytes_in_use"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eager", type=int, default=200_000, help="how many eager calls")
    parser.add_argument("--traced", type=int, default=1_000_000, help="how many calls inside jitted loops")
    parser.add_argument(
        "--forms", type=int, default=0, help="how many eager calls of each other form, in each framework"
    )
    parser.add_argument(
        "--shapes", type=int, default=0, help="how many calls of a shape of their own, in each framework"
    )
    parser.add_argument("--way", action="append", choices=_WARM_UP_OF_SHAPES, help="of those with shapes; absent: all")
    options = parser.parse_args()
    if options.eager:
        _print("eager", eager(options.eager))
        _print("a function of JAX's own", of_jax(options.eager))
    if options.traced:
        _print("traced", traced(options.traced))
    for framework, case in itertools.product(("numpy", "torch", "jax"), FORMS if options.forms else ()):
        _print(f"{case.name}, {framework}", eager(options.forms, case, framework))
    if options.forms:  # on a CPU by xla
        _print("a prompt in the matrix form, jax", eager(options.forms, PROMPT, algorithm="matrix"))
    for way in (options.way or _WARM_UP_OF_SHAPES) if options.shapes else ():
        # In a process of its own: it would take memory that another way has left free.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            _print(f"other shapes, {way}", pool.submit(shapes, options.shapes, way).result())


def _print(name: str, left: Growth) -> None:
    device = "unknown" if left.device is None else f"{left.device:+d} bytes"
    print(
        f"{name}: {left.calls} calls, resident memory {left.resident / 2**20:+.2f} MB "
        f"({left.at_once / 2**20:+.2f} MB at once), on the device {device}, {left.targets} targets",
        flush=True,
    )


if __name__ == "__main__":
    main()
