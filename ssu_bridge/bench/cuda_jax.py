"""The triton backend under jax.jit, against the xla backend, and the host time of an eager call."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ssu_bridge import update
from ssu_bridge.bench.cuda_steps import LAYER
from ssu_bridge.bench.timing import Timing, summary

_H, _P, _N, _G = LAYER
_ITERATIONS = 1000
# The states of calls on other slots are together at least this large, so that none is found in the cache.
_COLD_BYTES = 500 * 2**20


def print_loops(batches: list[int]) -> None:
    """Print the time of a step inside jit and lax.fori_loop, on a slotted cache that is donated."""
    print("one step inside jax.jit and lax.fori_loop, bfloat16, us: median (quartiles)")
    print(f"{'':<46}{'triton':<26}{'xla':<28}{'ratio':>6}")
    for batch in batches:
        calls = max(2, -(-_COLD_BYTES // (batch * _H * _P * _N * 2)))
        _print_loop(f"{batch}, other slots in each of {calls} calls", batch, calls)
    _print_loop("1, always the same slot", 1, 1)
    alone = _loop_time(1, 1, "triton", carry_out=False)
    print(f"{'  the same, its output not carried on':<46}{_us(alone):<26}\n")


def _print_loop(label: str, batch: int, calls: int) -> None:
    ours, xla = (_loop_time(batch, calls, backend) for backend in ("triton", "xla"))
    print(f"{label:<46}{_us(ours):<26}{_us(xla):<28}{xla.median / ours.median:>6.2f}", flush=True)


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


def _loop_time(batch: int, calls: int, backend: str, carry_out: bool = True, rounds: int = 9) -> Timing:
    """Time a step in a loop. What is not carried on, XLA does not compute itself; a kernel of ours it has to call."""
    state, arrays, slots = _arguments(batch, calls)
    step = functools.partial(update, dt_softplus=True, backend=backend)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(state: Any, out: Any, arrays: Any, slots: Any) -> Any:
        def body(i: Any, carry: Any) -> Any:
            rows = slots[0] if calls == 1 else slots[i % calls]
            new_out, state = step(carry[0], **arrays, state_batch_indices=rows)
            return state, new_out if carry_out else carry[1]

        return jax.lax.fori_loop(0, _ITERATIONS, body, (state, out))

    state, out = run(state, jnp.zeros_like(arrays["x"]), arrays, slots)
    samples = []
    for _ in range(rounds):
        state.block_until_ready()
        started = time.perf_counter()
        state, out = run(state, out, arrays, slots)
        state.block_until_ready()
        samples.append((time.perf_counter() - started) / _ITERATIONS)
    return summary(samples)


def print_host() -> None:
    """Print the host time of an eager call beside that of a trivial jitted function with as many arguments."""
    state, a, slots = _arguments(1, 1)
    slots = slots[0]
    states = [state, jnp.copy(state)]

    def trivial(
        state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, *, D: Any, dt_bias: Any, state_batch_indices: Any
    ) -> tuple[Any, Any]:
        return x + 1, state + 1

    jitted = jax.jit(trivial, donate_argnums=0)

    # Written out, because building the arguments would be part of what is measured.
    def call_trivial() -> None:
        _, states[0] = jitted(
            states[0], a["x"], a["dt"], a["A"], a["B"], a["C"],
            D=a["D"], dt_bias=a["dt_bias"], state_batch_indices=slots,
        )  # fmt: skip

    def call_update() -> None:
        _, states[1] = update(
            states[1], a["x"], a["dt"], a["A"], a["B"], a["C"],
            D=a["D"], dt_bias=a["dt_bias"], state_batch_indices=slots, dt_softplus=True,
        )  # fmt: skip

    times = _host_times({"update": call_update, "trivial": call_trivial}, states)
    print("host time of an eager JAX call, batch 1, nine arrays, state donated")
    print(f"  update {times['update']!s}; a jitted function that adds 1 to x and to the state {times['trivial']!s}")
    print(f"  ratio {times['update'].median / times['trivial'].median:.2f}")


def _host_times(functions: dict[str, Callable[[], Any]], states: list[Any]) -> dict[str, Timing]:
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(60):
        for name, function in functions.items():
            states[0].block_until_ready()
            states[1].block_until_ready()
            started = time.perf_counter()
            for _ in range(50):
                function()
            samples[name].append((time.perf_counter() - started) / 50)
    return {name: summary(values) for name, values in samples.items()}


def _us(timing: Timing) -> str:
    return f"{timing.median * 1e6:.2f} ({timing.lower * 1e6:.2f}-{timing.upper * 1e6:.2f})"
