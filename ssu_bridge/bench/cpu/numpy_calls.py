"""What calls with NumPy arrays cost on the host: alone, over a Torch call, and among JAX arrays."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

from ssu_bridge import update
from ssu_bridge.bench.timing import Timing, interleaved

_TORCH = "Torch tensors"


def times(arrays: dict[str, Any]) -> dict[str, Timing]:
    """Time a call of NumPy arrays, with the ratio to one of Torch tensors, and calls of JAX arrays, mixed too.

    Frameworks that are not installed are left out.
    """
    host = {name: array.copy() for name, array in arrays.items()}
    calls: dict[str, Callable[[], object]] = {"NumPy arrays": functools.partial(update, **host, dt_softplus=True)}
    if importlib.util.find_spec("torch"):
        import torch

        tensors: dict[str, Any] = {name: torch.tensor(array) for name, array in arrays.items()}
        calls[_TORCH] = functools.partial(update, **tensors, dt_softplus=True)
    if importlib.util.find_spec("jax"):
        import jax.numpy as jnp

        device = {name: jnp.array(array) for name, array in arrays.items()}
        mixed = {**device, **{name: arrays[name] for name in ("x", "B", "C", "state_batch_indices")}}
        calls |= {"JAX arrays": _jax_call(device), "JAX arrays, four operands of NumPy": _jax_call(mixed)}
    found = interleaved(calls, rounds=100, seconds=0.004)
    if _TORCH in found:
        ratio = found["NumPy arrays"].median / found[_TORCH].median
        found[f"NumPy arrays ({ratio:.2f} times Torch)"] = found.pop("NumPy arrays")
    return found


def _jax_call(arrays: dict[str, Any]) -> Callable[[], object]:
    others, states = {n: a for n, a in arrays.items() if n != "state"}, [arrays["state"].copy()]

    def call() -> None:
        _, states[0] = update(states[0], **others, dt_softplus=True)

    return call
