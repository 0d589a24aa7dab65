"""``jax.vmap`` of the step: one step runs all mapped calls, its sequences and slots those of all of them.

Of v mapped calls, call j has slots j*S to (j+1)*S - 1 of one long state, and likewise its sequences, rows and entries.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import batching

from ssu_bridge.core.arguments import ARGUMENTS, STATE, TABLES, TOKENWISE
from ssu_bridge.core.problem import Problem
from ssu_bridge.core.slots import read_slots, slots
from ssu_bridge.errors import UnsupportedError
from ssu_bridge.frontends.jax.kernel_primitive import kernel
from ssu_bridge.frontends.jax.mapped_axes import Maps
from ssu_bridge.frontends.jax.metadata import described
from ssu_bridge.frontends.jax.reshape_in_place import reshaped_after, reshaped_before
from ssu_bridge.frontends.jax.step_primitive import bind, step

_READ, _WRITE, _ENTRIES = "state_batch_indices", "dst_state_batch_indices", "intermediate_state_indices"
_EDGES = "cu_seqlens"
# What says something of each sequence.
_BY_SEQUENCE = tuple(name for name in TABLES if name not in TOKENWISE)
# One for all sequences of a step.
_PARAMETERS = ("A", "D", "dt_bias", "rand_seed")


def _map_step(operands: Any, axes: Any, *, problem: Problem, maps: Maps, **_: Any) -> tuple[list[Any], list[int]]:
    """Put the mapped axis first; where arrays are sharded is not known yet."""
    given, mapped = (dict(zip(problem.names, values, strict=True)) for values in (operands, axes))
    for name in _shared(problem, mapped):
        if mapped[name] is not None:
            raise UnsupportedError(
                f"{name}: jax.vmap cannot map it, because a step has one {name} for all its sequences; use jax.lax.map "
                "(a jax.lax.cond on a mapped predicate has all that it uses mapped)"
            )
    size = _size(given, mapped)
    # Results have the mapped axis, and so must what they have their types from.
    typed = {"x", *problem.results}
    around = frozenset(name for name, axis in mapped.items() if axis is not None or name in typed)
    arrays = {n: _lead(a, mapped[n], size) if n in around else a for n, a in given.items()}
    return bind(arrays, problem, (around, *maps)), [0] * len(problem.results)


def _map_kernel(operands: Any, axes: Any, *, problem: Problem, **_: Any) -> tuple[list[Any], list[int]]:
    """Make one step of the mapped ones."""
    given, mapped = (dict(zip(problem.names, values, strict=True)) for values in (operands, axes))
    size, shared = _size(given, mapped), _shared(problem, mapped)
    arrays = {n: a if n in shared else _lead(a, mapped[n], size) for n, a in given.items()}
    folded = _fold(problem, size, arrays, shared)
    options = dataclasses.replace(problem.options, pad_slot_id=-1)
    results = kernel.bind(*folded.values(), problem=described(options, folded))  # type: ignore[no-untyped-call]
    after = [reshaped_after(a, arrays[n].shape) for n, a in zip(problem.results[1:], results[1:], strict=True)]
    return [results[0].reshape(arrays["x"].shape), *after], [0] * len(results)


def register() -> None:
    """Give the primitives their rules."""
    batching.primitive_batchers[step] = _map_step
    batching.primitive_batchers[kernel] = _map_kernel


def _size(given: dict[str, Any], mapped: dict[str, int | None]) -> Any:
    return next(given[name].shape[axis] for name, axis in mapped.items() if axis is not None)


def _shared(problem: Problem, mapped: dict[str, int | None]) -> list[str]:
    """Return the names of the arrays that a step has for all its sequences, with no axis for the mapped calls."""
    shared = [name for name in _PARAMETERS if name in mapped]
    if problem.options.disable_state_update and all(mapped.get(name) is None for name in STATE):
        shared += [name for name in STATE if name in mapped]
    return shared


def _lead(array: Any, axis: int | None, size: int) -> Any:
    """Put the mapped axis first; give one to an array that has none."""
    if axis is None:
        return jnp.broadcast_to(array, (size, *array.shape))
    return jnp.moveaxis(array, axis, 0)


def _fold(problem: Problem, size: int, arrays: dict[str, Any], shared: list[str]) -> dict[str, Any]:
    """Return the arrays of the one step."""
    folded = {n: a if n in shared else _merged(a) for n, a in arrays.items() if n not in _BY_SEQUENCE}
    folded |= {name: reshaped_before(arrays[name], folded[name].shape) for name in problem.results[1:]}
    folded |= _tables(problem, size, arrays, 0 if "state" in shared else problem.slots)
    return {name: folded[name] for name in ARGUMENTS if name in folded}


def _merged(array: Any) -> Any:
    return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])


def _tables(problem: Problem, size: int, arrays: dict[str, Any], stride: int) -> dict[str, Any]:
    """Return the tables of the one step. A call's first slot is ``stride`` after that of the previous call."""
    result = {name: _merged(arrays[name]) for name in _BY_SEQUENCE if name in arrays and name != _EDGES}
    call = jnp.repeat(jnp.arange(size), problem.sequences)
    read = read_slots(jnp, problem, result)
    own = jnp.tile(jnp.arange(problem.sequences), size) if read is None else read
    if "intermediate_states" in arrays:
        count = arrays["intermediate_states"].shape[1]
        # Without a table, the entries are the slots; that still holds if there are as many.
        if _ENTRIES in result or count != stride:
            entries = result.get(_ENTRIES, own)
            result[_ENTRIES] = _moved(_ENTRIES, jnp.where(entries < count, entries, -1), call, size, count)
    for name in (_READ, _WRITE):
        if name in result:
            result[name] = _moved(name, slots(jnp, problem, result[name]), call, size, stride)
    if read is None and (problem.layout == "packed" or not stride == problem.slots == problem.sequences):
        # Made here: the caller's pad_slot_id is not meant for these.
        result[_READ] = _moved(_READ, own, call, size, stride)
    if problem.layout == "packed":
        result = {name: _with_gaps(table, size) for name, table in result.items()}
        result[_EDGES] = _edges(arrays[_EDGES], problem.tokens)
    return result


def _moved(name: str, places: Any, call: Any, size: int, stride: int) -> Any:
    """Return the places, those of each call numbered after those of the previous one; negative ones (padding) stay."""
    places = _counting(name, places, size * stride)
    call = call.reshape(-1, *[1] * (places.ndim - 1)).astype(places.dtype)
    return jnp.where(places >= 0, places + call * stride, -1)


def _counting(name: str, table: Any, most: Any) -> Any:
    """Return a table in a dtype that holds numbers up to ``most``, which is not known where sizes are symbolic."""
    if isinstance(most, int) and most > np.iinfo(table.dtype).max:
        table = table.astype(jax.dtypes.canonicalize_dtype("int64"))  # of 32 bits, unless those of 64 are enabled
        if most > np.iinfo(table.dtype).max:
            raise UnsupportedError(
                f"{name}: jax.vmap makes one step of all calls and would count to {most} in it, beyond "
                f"{table.dtype.name}; enable jax_enable_x64, or use jax.lax.map"
            )
    return table


# --- Packed rows ---

# The last call's sequences come first. What cu_seqlens then makes a sequence of between those of two calls, from the
# end of a call to the beginning of the one before, is empty, and rows of no sequence still belong to none.


def _edges(edges: Any, rows: int) -> Any:
    """Return cu_seqlens of all rows, from one for each call."""
    edges = _counting(_EDGES, edges, edges.shape[0] * rows)
    first = jnp.arange(edges.shape[0], dtype=edges.dtype)[:, None] * rows
    return jnp.append((jnp.clip(edges, 0, rows) + first)[::-1].ravel(), jnp.zeros(1, edges.dtype))


def _with_gaps(table: Any, size: int) -> Any:
    """Put a table's rows in that order, with a row of padding after each call."""
    table = table.reshape(size, table.shape[0] // max(size, 1), *table.shape[1:])[::-1]
    gaps = [(0, 0), (0, 1), *[(0, 0)] * (table.ndim - 2)]
    return _merged(jnp.pad(table, gaps, constant_values=-1))
