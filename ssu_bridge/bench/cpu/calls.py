"""What calls of JAX cost on the host besides the step: eager ones, first ones, and preparing an exported program."""

import functools
import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssu_bridge import export_checks, prepare, update, using
from ssu_bridge.bench.jax_calls import eager_calls
from ssu_bridge.bench.timing import Timing, interleaved, summary
from ssu_bridge.progress import progress

# Of fields that no backend uses on a CPU.
_UNUSED = ({"algorithm": "simple"}, {"triton_tile": (16, 4)}, {"philox_rounds": 7}, {"strict_in_place": True})
# A flag that makes a program of its own of each first call.
_pads = itertools.count(-1_000_000, -1)


def eager(arrays: dict[str, Any]) -> dict[str, Timing]:
    """Time an eager call, and trivial jitted functions with the ratio of its time to theirs."""
    functions, _ = eager_calls({name: jnp.array(array) for name, array in arrays.items()})
    times = interleaved(functions, rounds=200, seconds=0.004)
    ours = times.pop("update")
    return {"update": ours} | {f"{name} ({ours.median / t.median:.2f})": t for name, t in times.items()}


def first_calls(arrays: dict[str, Any], rounds: int = 5) -> dict[str, Timing]:
    """Time first calls of JAX, and calls that differ from one in configuration that no backend uses."""
    samples: dict[str, list[float]] = {"a first JAX call": [], "the next, other unused configuration": []}
    for _ in progress(range(rounds)):
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
