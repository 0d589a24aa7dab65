"""First calls on a sharded state, in processes with several virtual devices that share a compilation cache."""

import collections
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ssu_bridge import update
from ssu_bridge.bench.timing import Timing, summary
from ssu_bridge.progress import progress
from ssu_bridge.testing.cases import Case

DEVICES = 4
_P: Any = PartitionSpec
_CASE = Case("tiny", sequences=1, slots=1, nheads=DEVICES, headdim=4, dstate=8, ngroups=1, indices=(0,))
# Names of the processes of a round: what the first compiles, the second can find.
PROCESSES = ("a first process", "a second process")


def first_calls(rounds: int = 3) -> dict[str, Timing]:
    """Time first calls, each round in two new processes; the first finds an empty compilation cache."""
    samples: dict[str, list[float]] = collections.defaultdict(list)
    for _ in progress(range(rounds)):
        with tempfile.TemporaryDirectory() as cache:
            for process in PROCESSES:
                for call, (seconds, compiled) in _measured(cache).items():
                    samples[f"{call} in {process}, compiles {compiled}"].append(seconds)
    return {name: summary(values) for name, values in samples.items()}


def _measured(cache: str) -> dict[str, tuple[float, int]]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # Else no process finds what another has compiled of a program that XLA partitions.
        "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY": "true",
    }
    shown = subprocess.run([sys.executable, "-m", __name__], env=environment, stdout=subprocess.PIPE, check=True)
    measured: dict[str, tuple[float, int]] = json.loads(shown.stdout)
    return measured


def _main() -> None:
    """Print the seconds of each call and how many programs XLA compiled for it."""
    misses = []
    jax.monitoring.register_event_listener(
        lambda event, **_: misses.append(event) if event == "/jax/compilation_cache/cache_misses" else None
    )
    step: Callable[..., Any] = functools.partial(update, dt_softplus=True)
    calls: dict[str, Callable[..., Any]] = {"eager": step, "jitted": jax.jit(step, donate_argnames="state")}
    measured = {}
    step(**jax.tree.map(jnp.array, _CASE.arrays(seed=0)))  # loads the kernels, which is not measured
    for name, call in calls.items():
        given = _arrays()
        before, started = len(misses), time.perf_counter()
        for array in call(**given):
            array.block_until_ready()
        measured[name] = time.perf_counter() - started, len(misses) - before
    print(json.dumps(measured))


def _arrays() -> dict[str, jax.Array]:
    """Return the arrays of a tiny problem, sharded over heads."""
    mesh = jax.make_mesh((DEVICES,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = _CASE.arrays(seed=0)
    by_head = {name: _P(None, "heads") for name in ("state", "x", "dt", "z")}
    places = {name: NamedSharding(mesh, by_head.get(name, _P())) for name in arrays}
    # In memory of JAX's own, which it can donate.
    copied: dict[str, jax.Array] = jax.jit(functools.partial(jax.tree.map, jnp.copy), out_shardings=places)(arrays)
    copied["state"].block_until_ready()
    return copied


if __name__ == "__main__":
    _main()
