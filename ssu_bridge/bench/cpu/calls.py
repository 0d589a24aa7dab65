"""What calls cost on the host besides the step: NumPy arrays, first calls of JAX, and preparing an exported program."""

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssu_bridge import export_checks, prepare, update, using
from ssu_bridge.bench.timing import Timing, interleaved, summary

# Of fields that no backend uses on a CPU.
_UNUSED = ({"algorithm": "simple"}, {"triton_tile": (16, 4)}, {"philox_rounds": 7}, {"strict_in_place": True})
# A flag that makes a program of its own of each first call.
_pads = itertools.count(-1_000_000, -1)


def numpy_calls(arrays: dict[str, Any]) -> dict[str, Timing]:
    """Time a call of NumPy arrays, one of JAX arrays, and one with NumPy arrays that are copied for JAX."""
    host = {name: array.copy() for name, array in arrays.items()}
    device = {name: jnp.array(array) for name, array in arrays.items()}
    mixed = {**device, **{name: arrays[name] for name in ("x", "B", "C", "state_batch_indices")}}
    calls = {
        "NumPy arrays": lambda: update(**host, dt_softplus=True),
        "JAX arrays": _jax_call(device),
        "JAX arrays, four operands of NumPy": _jax_call(mixed),
    }
    return interleaved(calls, rounds=100, seconds=0.004)


def _jax_call(arrays: dict[str, Any]) -> Callable[[], object]:
    others, states = {n: a for n, a in arrays.items() if n != "state"}, [jnp.copy(arrays["state"])]

    def call() -> None:
        _, states[0] = update(states[0], **others, dt_softplus=True)

    return call


def first_calls(arrays: dict[str, Any], rounds: int = 5) -> dict[str, Timing]:
    """Time first calls of JAX, and calls that differ from one in configuration that no backend uses."""
    samples: dict[str, list[float]] = {"a first JAX call": [], "the next, other unused configuration": []}
    for _ in range(rounds):
        pad = next(_pads)
        first, *others = [_timed(arrays, pad, fields) for fields in ({}, *_UNUSED)]
        for name, values in zip(samples, ([first], others), strict=True):
            samples[name] += values
    return {name: summary(values) for name, values in samples.items()}


def preparations(arrays: dict[str, Any], nbytes: int = 40_000_000) -> dict[str, Timing]:
    """Time ``prepare`` for a program that holds large constants, and, to compare with, printing that program."""
    constants = np.random.default_rng(0).random(nbytes // 4, np.float32)
    given = {name: jnp.array(array) for name, array in arrays.items()}
    step = functools.partial(update, backend="cpu")
    program = jax.jit(lambda given: (step(**given), constants * given["x"].sum()))
    exported = jax.export.export(program, disabled_checks=export_checks())(given)
    calls = {
        f"prepare, {nbytes / 1e6:.0f} MB of constants": lambda: prepare(exported),
        "printing the program, for comparison": exported.mlir_module,
    }
    return interleaved(calls, rounds=5, seconds=0)


def _timed(arrays: dict[str, np.ndarray], pad: int, fields: dict[str, Any]) -> float:
    given: dict[str, Any] = {name: jnp.array(array).block_until_ready() for name, array in arrays.items()}
    with using(**fields):
        started = time.perf_counter()
        out, state = update(**given, pad_slot_id=pad)
        out.block_until_ready()
        state.block_until_ready()
        return time.perf_counter() - started
