"""What calls with NumPy arrays cost on the host: alone, and among JAX arrays where JAX is installed."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

from ssu_bridge import update
from ssu_bridge.bench.timing import Timing, interleaved


def times(arrays: dict[str, Any]) -> dict[str, Timing]:
    """Time a call of NumPy arrays, and with JAX one of JAX arrays and one with NumPy arrays that are copied for it."""
    host = {name: array.copy() for name, array in arrays.items()}
    calls: dict[str, Callable[[], object]] = {"NumPy arrays": functools.partial(update, **host, dt_softplus=True)}
    if importlib.util.find_spec("jax"):
        import jax.numpy as jnp

        device = {name: jnp.array(array) for name, array in arrays.items()}
        mixed = {**device, **{name: arrays[name] for name in ("x", "B", "C", "state_batch_indices")}}
        calls |= {"JAX arrays": _jax_call(device), "JAX arrays, four operands of NumPy": _jax_call(mixed)}
    return interleaved(calls, rounds=100, seconds=0.004)


def _jax_call(arrays: dict[str, Any]) -> Callable[[], object]:
    others, states = {n: a for n, a in arrays.items() if n != "state"}, [arrays["state"].copy()]

    def call() -> None:
        _, states[0] = update(states[0], **others, dt_softplus=True)

    return call
