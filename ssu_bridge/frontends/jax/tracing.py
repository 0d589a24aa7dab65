"""Tracing a call: it is checked here, and becomes the primitive or, for the xla backend, jax.numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssu_bridge.backends.base import TracedKernel
from ssu_bridge.config import Backend
from ssu_bridge.core.arguments import STATE
from ssu_bridge.core.problem import Options, Problem
from ssu_bridge.core.quantized import QuantizedState
from ssu_bridge.core.replay import ReplayState
from ssu_bridge.dispatch import choose, load
from ssu_bridge.errors import BackendNotAvailableError, UnsupportedError
from ssu_bridge.frontends.base import Arrays, named, require_one_framework, returned
from ssu_bridge.frontends.jax.metadata import (
    copied_from_host,
    described,
    platforms,
    refuse_out,
    require_live,
    unwrapped,
    words,
)
from ssu_bridge.frontends.jax.sharding.explicit import explicit_mesh, on_explicit_shards
from ssu_bridge.frontends.jax.sharding.shards import shard_seed
from ssu_bridge.frontends.jax.step_primitive import bind, vary_alike, varying


def trace_call(options: Options, arrays: Arrays, out: Any) -> tuple[Any, ...]:
    """Return what ``update`` does, for arrays of which some are traced."""
    require_one_framework(arrays)
    arrays = unwrapped(arrays)
    require_live(arrays)
    refuse_out(out)
    # As JAX arrays, because NumPy's cannot be indexed by what is traced.
    operands = [
        jnp.asarray(a) if isinstance(a, np.ndarray) else a for a in copied_from_host(arrays, options.pad_slot_id)
    ]
    return with_given(arrays, trace(options, *operands))


def trace(options: Options, *positional: Any) -> tuple[Any, ...]:
    """Return what ``update`` returns, with None for what the program does not return: ``with_given`` fills it in.

    That is a state that is only read, which the program would have to copy, and a ``jax.Ref``, which is written here.

    Args:
        options: of the call.
        *positional: the arrays.
    """
    given = named(positional)
    arrays = {name: array[...] if isinstance(array, jax.Ref) else array for name, array in given.items()}
    problem = described(options, arrays)
    if "rand_seed" in arrays:
        arrays["rand_seed"] = words(arrays["rand_seed"])
    _require_supported(problem)
    mesh = explicit_mesh(arrays.values())
    results = _run_described(problem, arrays) if mesh is None else on_explicit_shards(problem, arrays, mesh, _run)
    after = dict(zip(problem.results, results, strict=True))
    for name, result in after.items():
        if isinstance(given.get(name), jax.Ref):
            # Not [...]: under vmap JAX puts the mapped axis of a value where the reference has it for an index only.
            given[name][:] = result
            after[name] = None
    kept = dict.fromkeys(STATE) if options.disable_state_update else {}
    return returned({**{name: kept.get(name, array) for name, array in arrays.items()}, **after})


def _require_supported(problem: Problem) -> None:
    """Raise the error of the process's default platform, if no platform has a backend for the call."""
    errors = []
    for platform in platforms().items():
        try:
            choose(problem.on(*platform))
            return
        except (UnsupportedError, BackendNotAvailableError) as error:
            errors.append(error)
    raise errors[0]


def _run(options: Options, arrays: dict[str, Any]) -> tuple[Any, ...]:
    return _run_described(described(options, arrays), arrays)


def _run_described(problem: Problem, arrays: dict[str, Any]) -> tuple[Any, ...]:
    if problem.options.config.backend is Backend.XLA:
        # Traced into the program instead of becoming the primitive, it can be differentiated.
        kernel = load(problem.on(*next(iter(platforms().items()))))
        assert isinstance(kernel, TracedKernel)
        return kernel.function(dict(zip(arrays, vary_alike(arrays.values()), strict=True)))
    if "rand_seed" in arrays:
        # What varies with any operand is stored as a state of its own, also where the one that is read does not vary.
        own = frozenset[Any]().union(*(varying(jax.typeof(array)) for array in arrays.values()))
        own -= varying(jax.typeof(arrays["rand_seed"]))
        arrays = {**arrays, "rand_seed": shard_seed(arrays["rand_seed"], own)}
    return tuple(bind(arrays, problem))


def with_given(arrays: Arrays, results: tuple[Any, ...]) -> tuple[Any, ...]:
    """Fill in the arguments of a call where ``trace`` returns None."""
    return results[0], *map(_with_given, results[1:], returned({**named(arrays), "out": None})[1:])


def _with_given(result: Any, array: Any) -> Any:
    if isinstance(result, QuantizedState | ReplayState):
        return type(result)(*map(_with_given, result, array))
    return array if result is None else result
