"""The step in jax.numpy, traced into the caller's program."""

from typing import Any

import jax
import jax.numpy as jnp

from ssu_bridge.backends.xla import chunks, forms, loop, replay
from ssu_bridge.core.problem import Problem
from ssu_bridge.core.slots import read_slots


def run(problem: Problem, arrays: dict[str, Any]) -> tuple[Any, ...]:
    """Return what ``problem.results`` lists."""
    # The caller's modes are about the caller's arithmetic; this one's axes and dtypes are meant as they are.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        read = read_slots(jnp, problem, arrays)
        if problem.replays:
            results = replay.run(problem, arrays, read)
            return tuple(results[name] for name in problem.results)
        chunking = forms.chunking(problem)
        results = loop.run(problem, arrays, read) if chunking is None else chunks.run(problem, chunking, arrays, read)
        return tuple(results[name] for name in problem.results)
