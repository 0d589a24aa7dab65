"""The triton backend under jax.jit, against the xla backend, and the host time of an eager call."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssu_bridge import ReplayCursor, advance_replay, to_replay, update
from ssu_bridge.bench.cuda.steps import LAYER, Sizes
from ssu_bridge.bench.jax_calls import eager_calls, ratios
from ssu_bridge.bench.timing import Timing, microseconds, summary

_LAYERS = 16
# Of a replay state with a window of 16, whole cycles.
_ITERATIONS = 32
# The states of the caches are together about this large, so that none is found in the GPU's cache.
_COLD_BYTES = 500 * 2**20


class Work(NamedTuple):
    """What a call of the loop computes: one token of each sequence, or several on an axis of their own.

    With a window, one token on a replay state of that window.
    """

    batch: int
    tokens: int = 0
    sizes: Sizes = LAYER
    state: str = "bfloat16"
    window: int = 0

    def __str__(self) -> str:
        tokens = f"{self.tokens} tokens" if self.tokens else "one token"
        tokens += f", replay of {self.window}" if self.window else ""
        return f"{self.batch}, {tokens}, H {self.sizes.nheads}, {self.state} state"


def print_loops(batches: list[int]) -> None:
    """Print the time of a step inside jit and lax.fori_loop, on a slotted cache that is donated."""
    print(f"one step inside jax.jit and lax.fori_loop, whose body has {_LAYERS} in a row, each the next one's x,")
    print("bfloat16, us: median (quartiles)")
    print(f"{'':<34}{'triton':<26}{'xla':<28}{'ratio':>6}")
    _print_loop("1, all layers on one slot", 1, 1)
    for batch in batches:
        caches = cold_caches(Work(batch))
        _print_loop(f"{batch}, {caches} caches in turn", batch, caches)
    print()


def _print_loop(label: str, batch: int, caches: int) -> None:
    ours, xla = in_turn([loop(Work(batch), caches, backend) for backend in ("triton", "xla")])
    print(f"{label:<34}{microseconds(ours):<26}{microseconds(xla):<28}{xla.median / ours.median:>6.2f}", flush=True)


def _arguments(work: Work, calls: int) -> dict[str, Any]:
    """Return the arrays of a step, and the slots of each call: of one cache."""
    keys = iter(jax.random.split(jax.random.key(0), 10))
    H, P, N, G = work.sizes
    batch, rows = work.batch, (work.batch, work.tokens) if work.tokens else (work.batch,)

    def normal(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jax.random.normal(next(keys), shape, dtype)

    slots = jax.random.permutation(next(keys), batch * calls).astype("int32").reshape(calls, batch)
    return {
        "state": normal(batch * calls, H, P, N, dtype=work.state),
        "x": normal(*rows, H, P),
        "dt": normal(*rows, H),
        "A": -jnp.exp(normal(H, dtype=jnp.float32)),
        "B": normal(*rows, G, N),
        "C": normal(*rows, G, N),
        "D": normal(H),
        "dt_bias": normal(H),
        "state_batch_indices": slots,
    }


def _replayed(work: Work, arrays: dict[str, Any], calls: int) -> dict[str, Any]:
    """Return the same for replay states, one for each call; they share a cursor, as the layers of a model do."""
    groups = work.sizes.ngroups
    states = jnp.split(arrays["state"], calls)
    slots = jnp.tile(jnp.arange(work.batch, dtype="int32"), (calls, 1))
    return arrays | {
        "state": tuple(to_replay(state, work.window, 1, groups, "bfloat16", "bfloat16") for state in states),
        "state_batch_indices": slots,
        "replay": ReplayCursor.empty(work.batch, work.window, 1, slots),
    }


def cold_caches(work: Work) -> int:
    """Return how many caches of so many sequences to go through for none to be found in the GPU's cache."""
    H, P, N, _ = work.sizes
    return min(_LAYERS, max(2, -(-_COLD_BYTES // (work.batch * H * P * N * jnp.dtype(work.state).itemsize))))


def loop(
    work: Work,
    caches: int,
    backend: str,
    place: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    iterations: int = _ITERATIONS,
) -> Callable[[], float]:
    """Return a function that runs a jitted loop over steps, on so many caches in turn, and returns the time of a step.

    ``place`` puts the arrays where they are to be. The start of a loop is a part of each of its steps.
    """
    arrays = _arguments(work, caches)
    arrays = place(_replayed(work, arrays, caches) if work.window else arrays)
    state, cursor = arrays.pop("state"), arrays.pop("replay", None)
    carry = state if work.window else (state,), cursor, arrays.pop("x")
    slots = arrays.pop("state_batch_indices")

    @functools.partial(jax.jit, donate_argnums=0)
    def steps(carry: Any, arrays: Any, slots: Any) -> Any:
        def body(_: Any, carry: Any) -> Any:
            states, cursor, x = carry
            states = [*states]
            for layer in range(_LAYERS):
                at, rows = layer % len(states), slots[layer % caches]
                call = {**arrays, "state_batch_indices": rows, "dt_softplus": True, "backend": backend}
                x, states[at] = update(states[at], x, **call, replay=cursor)
            if cursor is not None:
                cursor = advance_replay(cursor, slots[0], tokens=1)
            return tuple(states), cursor, x

        return jax.lax.fori_loop(0, iterations, body, carry)

    def run() -> float:
        nonlocal carry
        started = time.perf_counter()
        carry = jax.block_until_ready(steps(carry, arrays, slots))  # type: ignore[no-untyped-call]
        return (time.perf_counter() - started) / iterations / _LAYERS

    run()
    return run


def in_turn(loops: Sequence[Callable[[], float]], rounds: int = 9) -> list[Timing]:
    """Run each in turn, round after round."""
    samples = [[run() for run in loops] for _ in range(rounds)]
    return [summary(of_one) for of_one in map(list, zip(*samples, strict=True))]


def print_host() -> None:
    """Print the host time of an eager call and of a trivial jitted function with as many arguments."""
    arrays = _arguments(Work(1), 1)
    calls, states = eager_calls({**arrays, "state_batch_indices": arrays["state_batch_indices"][0]})
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
