"""The JAX frontend.

Tracing checks the call and binds a primitive (``tracing``, ``step_primitive``, ``vmap``); lowering knows the
platform, chooses the backend, loads its kernel and registers it as an XLA FFI target. An eager call is a jitted
function around the same, with the state donated (``eager``).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ssu_bridge.backends.base import HostKernel
from ssu_bridge.config import Backend
from ssu_bridge.core.problem import Options
from ssu_bridge.dispatch import Choice, consider_problem, load
from ssu_bridge.frontends.base import Arrays, Launch, named, returned
from ssu_bridge.frontends.jax import eager, vmap
from ssu_bridge.frontends.jax.metadata import (
    described,
    explain_failure,
    platform_of,
    platforms,
    refuse_out,
    unwrapped,
    words,
    wraps_array,
)
from ssu_bridge.frontends.jax.tracing import trace_call

vmap.register()


def launcher(state_type: type, options: Options) -> Launch:
    """Return the function that traces calls with these options, launches them, or runs them on the host."""
    if wraps_array(state_type):
        return functools.partial(_launch_unwrapped, options)
    if issubclass(state_type, jax.core.Tracer):
        return functools.partial(trace_call, options)
    if options.config.backend is Backend.REFERENCE:
        return functools.partial(_run_on_host, options)
    if issubclass(state_type, jax.Ref):
        return eager.launcher_on_references(options)
    return eager.launcher(state_type, options)


_launcher: Callable[[Any, Options], Launch] = functools.lru_cache(maxsize=64)(launcher)


def _launch_unwrapped(options: Options, arrays: Arrays, out: Any) -> tuple[Any, ...]:
    arrays = unwrapped(arrays)
    return _launcher(type(arrays[0]), options)(arrays, out)


def consider(arrays: Arrays, out: None, options: Options) -> tuple[Choice, ...]:
    """Return the choice for the arrays' platform; while tracing, for each platform of the process."""
    arrays = unwrapped(arrays)
    explain_failure(arrays)
    state = arrays[0]
    traced = isinstance(state, jax.core.Tracer)
    among = platforms().items() if traced else [_platform_of_array(state)]
    problem = described(options, named(arrays))
    return tuple(consider_problem(problem.on(*platform)) for platform in among)


def _platform_of_array(array: Any) -> tuple[str, tuple[int, int] | None]:
    name, _ = platform_of(next(iter(array.sharding.device_set)))
    return name, platforms().get(name)


def seeded(arrays: Arrays, options: Options) -> Arrays:
    """Return the arrays without a seed of their own: a program that drew it would round the same way in every run."""
    return unwrapped(arrays)


def to_host(array: Any) -> np.ndarray:
    """Return a NumPy copy. A view would keep JAX from donating the array."""
    return np.array(array[...] if isinstance(array, jax.Ref) else words(array))


def from_host(array: np.ndarray, like: Any = None) -> Any:
    """Return a JAX array with a copy of the values; a NumPy one where JAX was given one of those."""
    if isinstance(like, np.ndarray):
        return np.array(array)
    # Where that can be, the first has the memory of the NumPy array, may_alias or not, which JAX does not donate; the
    # copy has not. jnp.array compiles a program for each shape.
    first = jax.device_put(array, None if like is None else like.sharding)
    return jax.block_until_ready(jax.device_put(first, may_alias=False))  # type: ignore[no-untyped-call]


def _run_on_host(options: Options, arrays: Arrays, out: Any) -> tuple[Any, ...]:
    arrays = unwrapped(arrays)
    explain_failure(arrays)
    refuse_out(out)
    given = named(arrays)
    problem = described(options, given).on(*_platform_of_array(arrays[0]))
    kernel = load(problem)
    assert isinstance(kernel, HostKernel)
    host = {name: to_host(array) for name, array in given.items()}
    host["out"] = np.empty(host["x"].shape, host["x"].dtype)
    kernel.function(host, host["out"])
    after = {name: from_host(host[name], given.get(name, given["x"])) for name in problem.results}
    for name in problem.results[1:]:
        if isinstance(given[name], jax.Ref):
            given[name][...] = after[name]
            after[name] = given[name]
        elif options.donate:
            given[name].delete()
    return returned({**given, **after})
