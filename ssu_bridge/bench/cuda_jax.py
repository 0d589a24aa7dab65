"""The triton backend under jax.jit, against the xla backend, and the host time of an eager call."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ssu_bridge import update
from ssu_bridge.bench.cuda_steps import LAYER
from ssu_bridge.bench.jax_calls import eager_calls, ratios
from ssu_bridge.bench.timing import Timing, microseconds, summary

_H, _P, _N, _G = LAYER
_LAYERS = 16
_ITERATIONS = 30
# The states of the caches are together about this large, so that none is found in the GPU's cache.
_COLD_BYTES = 500 * 2**20


def print_loops(batches: list[int]) -> None:
    """Print the time of a step inside jit and lax.fori_loop, on a slotted cache that is donated."""
    print(f"one step inside jax.jit and lax.fori_loop, whose body has {_LAYERS} in a row, each the next one's x,")
    print("bfloat16, us: median (quartiles)")
    print(f"{'':<34}{'triton':<26}{'xla':<28}{'ratio':>6}")
    _print_loop("1, all layers on one slot", 1, 1)
    for batch in batches:
        caches = cold_caches(batch)
        _print_loop(f"{batch}, {caches} caches in turn", batch, caches)
    print()


def _print_loop(label: str, batch: int, caches: int) -> None:
    ours, xla = (loop_time(batch, caches, backend) for backend in ("triton", "xla"))
    print(f"{label:<34}{microseconds(ours):<26}{microseconds(xla):<28}{xla.median / ours.median:>6.2f}", flush=True)


def _arguments(batch: int, calls: int) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """Return the state, the other arguments of a step, and the slots of each call."""
    keys = iter(jax.random.split(jax.random.key(0), 10))

    def normal(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jax.random.normal(next(keys), shape, dtype)

    slots = jax.random.permutation(next(keys), batch * calls).astype("int32").reshape(calls, batch)
    arrays = {
        "x": normal(batch, _H, _P),
        "dt": normal(batch, _H),
        "A": -jnp.exp(normal(_H, dtype=jnp.float32)),
        "B": normal(batch, _G, _N),
        "C": normal(batch, _G, _N),
        "D": normal(_H),
        "dt_bias": normal(_H),
    }
    return normal(batch * calls, _H, _P, _N), arrays, slots


def cold_caches(batch: int) -> int:
    """Return how many caches of so many sequences to go through for none to be found in the GPU's cache."""
    return min(_LAYERS, max(2, -(-_COLD_BYTES // (batch * _H * _P * _N * 2))))


def loop_time(batch: int, caches: int, backend: str, rounds: int = 9) -> Timing:
    """Return the time of a step in a jitted loop over steps, on so many caches in turn."""
    state, arrays, slots = _arguments(batch, caches)
    x = arrays.pop("x")

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(state: Any, x: Any, arrays: Any, slots: Any) -> Any:
        def body(_: Any, carry: Any) -> Any:
            state, x = carry
            for layer in range(_LAYERS):
                rows = slots[layer % caches]
                x, state = update(state, x, **arrays, state_batch_indices=rows, dt_softplus=True, backend=backend)
            return state, x

        return jax.lax.fori_loop(0, _ITERATIONS, body, (state, x))

    state, x = run(state, x, arrays, slots)
    samples = []
    for _ in range(rounds):
        state.block_until_ready()
        started = time.perf_counter()
        state, x = run(state, x, arrays, slots)
        state.block_until_ready()
        samples.append((time.perf_counter() - started) / _ITERATIONS / _LAYERS)
    return summary(samples)


def print_host() -> None:
    """Print the host time of an eager call beside that of a trivial jitted function with as many arguments."""
    state, a, slots = _arguments(1, 1)
    calls, states = eager_calls({**a, "state": state, "state_batch_indices": slots[0]})
    times = _host_times(calls, states)
    print("host time of an eager JAX call, batch 1, nine arrays, state donated")
    for name, timing in times.items():
        print(f"  {name:<54}{timing!s}")
    print(f"  {ratios({name: timing.median for name, timing in times.items()})}")


def _host_times(functions: dict[str, Callable[[], Any]], states: list[Any]) -> dict[str, Timing]:
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(60):
        for name, function in functions.items():
            for state in states:
                state.block_until_ready()
            started = time.perf_counter()
            for _ in range(50):
                function()
            samples[name].append((time.perf_counter() - started) / 50)
    return {name: summary(values) for name, values in samples.items()}
