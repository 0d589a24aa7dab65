"""Where states are loaded from and stored to, by the tables of a call, in jax.numpy.

An array of places has -1 where nothing is loaded or stored; None stands for each sequence's own number.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from ssu_bridge.core.arguments import TOKENWISE
from ssu_bridge.core.problem import Problem
from ssu_bridge.core.slots import slots


class Owners(NamedTuple):
    """The sequence of each packed row, (rows,), its token there, and whether it has one; the lengths of all, (b,).

    A row that sequences share is the first's, and the others' lengths are not their own then.
    """

    sequence: Any
    token: Any
    is_owned: Any
    starts: Any
    lengths: Any


def row_owners(problem: Problem, arrays: dict[str, Any]) -> Owners:
    """Return which sequence each packed row belongs to. There is at least one sequence."""
    rows = jnp.arange(problem.tokens)[:, None]
    edges = jnp.clip(arrays["cu_seqlens"], 0, problem.tokens)
    starts, ends = edges[:-1], edges[1:]
    if problem.longest is not problem.tokens:
        ends = jnp.minimum(ends, starts + problem.longest)
    owned = (starts <= rows) & (rows < ends)
    sequence = jnp.argmax(owned, axis=1)
    # Of a sequence that shares no row, all; no more than there are rows, however sequences share them.
    first = owned & (sequence[:, None] == jnp.arange(problem.sequences))
    return Owners(sequence, rows[:, 0] - starts[sequence], owned.any(axis=1), starts, jnp.sum(first, axis=0))


def owned_rows(arrays: dict[str, Any], owners: Owners) -> dict[str, Any]:
    """Return the arrays with zeros in packed rows of no sequence: what those hold reaches no result and no gradient."""

    def masked(array: Any) -> Any:
        return jnp.where(owners.is_owned.reshape(-1, *[1] * (array.ndim - 1)), array, 0)

    return arrays | {name: masked(arrays[name]) for name in TOKENWISE if name in arrays}


def stored_each_token(problem: Problem, arrays: dict[str, Any]) -> dict[str, Any]:
    """Return the arrays that are stored to after each token, with one leading axis."""
    written = {"state": arrays["state"]} if "dst_state_batch_indices" in problem.tables else {}
    if "intermediate_states" in arrays:
        buffer = arrays["intermediate_states"]
        written["intermediate_states"] = buffer.reshape(buffer.shape[0] * buffer.shape[1], *buffer.shape[2:])
    return written


def places(
    problem: Problem, arrays: dict[str, Any], read: Any, sequence: Any, token: Any, is_owned: Any
) -> dict[str, Any]:
    """Return the places in those that some sequences' tokens are stored to."""
    places = {}
    stores = is_owned if read is None else is_owned & (read[sequence] >= 0)
    if "dst_state_batch_indices" in problem.tables:
        table = arrays["dst_state_batch_indices"]
        place = slots(jnp, problem, table[sequence, jnp.minimum(token, table.shape[1] - 1)])
        places["state"] = jnp.where(stores & (token < table.shape[1]), place, -1)
    if "intermediate_states" in arrays:
        entries, steps = arrays["intermediate_states"].shape[:2]
        own = jnp.arange(problem.sequences) if read is None else read
        entry = arrays.get("intermediate_state_indices", own)[sequence]
        stride = problem.options.intermediate_stride
        step = token // stride
        inside = stores & (entry >= 0) & (entry < entries) & ((token + 1) % stride == 0) & (step < steps)
        # Only entries in range are multiplied: others could overflow into it.
        places["intermediate_states"] = jnp.where(inside, jnp.where(inside, entry, 0) * steps + step, -1)
    return places


def final_slots(problem: Problem, arrays: dict[str, Any], read: Any) -> Any:
    """Return the slots that the final states go to."""
    if "dst_state_batch_indices" not in arrays:
        return read
    final = slots(jnp, problem, arrays["dst_state_batch_indices"])
    return final if read is None else jnp.where(read >= 0, final, -1)


def results(
    problem: Problem, arrays: dict[str, Any], read: Any, written: dict[str, Any], states: Any, out: Any
) -> dict[str, Any]:
    """Return the arrays as they are after the call, with the final states stored where it has tokens."""
    results = {name: array.reshape(arrays[name].shape) for name, array in written.items()}
    if "state" in problem.results and "state" not in written and problem.tokens:
        results["state"] = store(arrays["state"], final_slots(problem, arrays, read), states)
    return arrays | results | {"out": out}


def carried(problem: Problem, arrays: dict[str, Any]) -> Any:
    """Return the dtype that states have from one token to the next."""
    return arrays["state"].dtype if problem.rounds_each_token else jnp.float32


def load(problem: Problem, arrays: dict[str, Any], places: Any) -> Any:
    """Return states as they are carried; zeros for a padding index and for a sequence without an initial state."""
    state, has_state, dtype = arrays["state"], arrays.get("has_initial_state"), carried(problem, arrays)
    if places is not None:
        has_state = places >= 0 if has_state is None else has_state & (places >= 0)
        if problem.slots == 0:
            return jnp.zeros((problem.sequences, *state.shape[1:]), dtype)
        rows = state[jnp.where(places >= 0, places, 0)].astype(dtype)
    else:
        rows = state[: problem.sequences].astype(dtype)
    return rows if has_state is None else jnp.where(has_state.reshape(-1, *[1] * (state.ndim - 1)), rows, 0)


def store(array: Any, places: Any, rows: Any) -> Any:
    """Put rows into an array, in its dtype."""
    rows = rows.astype(array.dtype)
    if places is None:
        # That would be a scatter without indices; over one in a shard_map JAX 0.11's XLA ends the process.
        return rows if rows.shape == array.shape else array.at[: rows.shape[0]].set(rows)
    # A padding index goes past the end, where the scatter drops it; each to a place of its own, because XLA writes
    # faster where no two rows go to one place.
    dropped = array.shape[0] + jnp.arange(rows.shape[0], dtype=places.dtype)
    return array.at[jnp.where(places >= 0, places, dropped)].set(rows, mode="drop", unique_indices=True)
