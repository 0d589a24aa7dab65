"""The growth of a process's memory and of its XLA FFI targets over many calls.

python -m ssu_bridge.bench.memory
"""

import argparse
import ctypes
import functools
import gc
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssu_bridge import update
from ssu_bridge.testing.cases import Case

CASE = Case("small", headdim=8, dstate=16)
# After so many calls the process has all that it keeps.
_WARM_UP = 1000
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


def eager(calls: int) -> Growth:
    """Measure eager calls, each with the state of the one before."""
    given: dict[str, Any] = {name: jnp.array(array) for name, array in CASE.arrays(seed=0).items()}

    def run(count: int) -> None:
        for _ in range(count):
            _, given["state"] = update(**given, **CASE.flags)
        given["state"].block_until_ready()

    return growth(run, calls)


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


def growth(run: Callable[[int], None], calls: int) -> Growth:
    """Return what ``run(calls)`` adds to the process, after a first run of some."""
    import jax_tvm_ffi

    run(_WARM_UP)
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
    arguments = parser.parse_args()
    measures = (("eager", eager, arguments.eager), ("traced", traced, arguments.traced))
    for name, measure, calls in (*measures, ("a function of JAX's own", of_jax, arguments.eager)):
        left = measure(calls)
        device = "unknown" if left.device is None else f"{left.device:+d} bytes"
        print(
            f"{name}: {left.calls} calls, resident memory {left.resident / 2**20:+.2f} MB "
            f"({left.at_once / 2**20:+.2f} MB at once), on the device {device}, {left.targets} targets"
        )


if __name__ == "__main__":
    main()
