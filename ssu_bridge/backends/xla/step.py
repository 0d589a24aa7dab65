"""The step in jax.numpy, traced into the caller's program."""

from typing import Any

import jax
import jax.numpy as jnp

from ssu_bridge.core.arguments import MOST_TOKENS_OF_A_TREE, TOKENWISE
from ssu_bridge.core.problem import Problem
from ssu_bridge.core.slots import read_slots, slots


def run(problem: Problem, arrays: dict[str, Any]) -> tuple[Any, ...]:
    """Return what ``problem.results`` lists."""
    # The caller's modes are about the caller's arithmetic; this one's axes and dtypes are meant as they are.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        read = read_slots(jnp, problem, arrays)
        form = {"single": _single, "multi": _multi, "packed": _packed}[problem.form]
        results = form(problem, arrays, read)
        return tuple(results[name] for name in problem.results)


def _single(problem: Problem, arrays: dict[str, Any], read: Any) -> dict[str, Any]:
    new, out = _token(problem, arrays, _load(problem, arrays, read))
    places = _places(problem, arrays, read, jnp.arange(problem.sequences), 0, True)
    written = {n: _store(array, places[n], new) for n, array in _stored_each_token(problem, arrays).items()}
    return _results(problem, arrays, read, written, new, out)


def _multi(problem: Problem, arrays: dict[str, Any], read: Any) -> dict[str, Any]:
    """All sequences side by side, one token after another."""

    def body(carry: Any, token: Any) -> tuple[Any, Any]:
        kept, written = carry
        rows, places, number = token
        states, out = _token(problem, arrays | rows, _continued(kept, start, rows.get("parent_tokens"), number))
        written = {name: _store(array, places[name], states) for name, array in written.items()}
        return (_keep(kept, states, number), written), out

    rows = {name: jnp.moveaxis(arrays[name], 1, 0) for name in TOKENWISE if name in arrays}
    sequences, tokens = jnp.arange(problem.sequences)[None], jnp.arange(problem.tokens)[:, None]
    places = _places(problem, arrays, read, sequences, tokens, True)
    start = _load(problem, arrays, read)
    kept = _kept(problem, arrays, start, problem.tokens), _stored_each_token(problem, arrays)
    (kept, written), outs = jax.lax.scan(body, kept, (rows, places, tokens[:, 0]))
    return _results(problem, arrays, read, written, kept, jnp.moveaxis(outs, 0, 1))


def _packed(problem: Problem, arrays: dict[str, Any], read: Any) -> dict[str, Any]:
    """One row after another; a row of no sequence has zeros for its output.

    Of sequences that share rows, results are undefined: a row is computed for the first of its sequences alone.
    """
    if not problem.sequences:
        return arrays | {"out": jnp.zeros_like(arrays["x"])}
    rows = jnp.arange(problem.tokens)[:, None]
    edges = jnp.clip(arrays["cu_seqlens"], 0, problem.tokens)
    starts, ends = edges[:-1], edges[1:]
    if "parent_tokens" in arrays:
        ends = jnp.minimum(ends, starts + MOST_TOKENS_OF_A_TREE)
    owned = (starts <= rows) & (rows < ends)
    sequence, is_owned = jnp.argmax(owned, axis=1)[:, None], owned.any(axis=1)[:, None]
    token = rows - starts[sequence]
    places = _places(problem, arrays, read, sequence, token, is_owned)
    written = _stored_each_token(problem, arrays)
    if "state" in problem.results and "state" not in written:
        final = _final_slots(problem, arrays, read)
        final = sequence if final is None else final[sequence]
        written["state"] = arrays["state"]
        places["state"] = jnp.where(is_owned & (rows + 1 == ends[sequence]), final, -1)
    # Loaded before the first store: row by row, XLA would copy the state.
    start = _load(problem, arrays, read)

    def body(carry: Any, row: Any) -> tuple[Any, Any]:
        kept, written = carry
        own, places, sequence, token, is_owned = row
        own = {name: value[None] for name, value in own.items()}
        old = _continued(kept, start[sequence], own.get("parent_tokens"), token)
        new, out = _token(problem, arrays | own, jnp.where(token == 0, start[sequence], old))
        written = {name: _store(array, places[name], new) for name, array in written.items()}
        return (_keep(kept, new, token[0]), written), jnp.where(is_owned, out[0], 0)

    own = {name: arrays[name] for name in TOKENWISE if name in arrays}
    kept = _kept(problem, arrays, jnp.zeros_like(start[:1]), MOST_TOKENS_OF_A_TREE)
    (_, written), out = jax.lax.scan(body, (kept, written), (own, places, sequence, token, is_owned[:, 0]))
    return _results(problem, arrays, read, written, None, out)


# --- The states that tokens continue ---

# Of a chain that of the token before; of a tree those after all tokens before, with an axis of tokens in front.


def _kept(problem: Problem, arrays: dict[str, Any], start: Any, most: int) -> Any:
    """Return what is kept before the first token, of states that start so."""
    return jnp.zeros((most, *start.shape), start.dtype) if "parent_tokens" in arrays else start


def _keep(kept: Any, states: Any, token: Any) -> Any:
    """Return what is kept after a token. A token after the last of a tree, which is no sequence's, is dropped."""
    return states if kept.ndim == states.ndim else kept.at[token].set(states, mode="drop")


def _continued(kept: Any, start: Any, parents: Any, token: Any) -> Any:
    """Return the states that a token of each of some sequences continues."""
    if parents is None:
        return kept
    is_earlier = (parents >= 0) & (parents < token)
    earlier = kept[jnp.where(is_earlier, parents, 0), jnp.arange(kept.shape[1])]
    return jnp.where(is_earlier.reshape(-1, *[1] * (start.ndim - 1)), earlier, start)


# --- One token ---


def _token(problem: Problem, arrays: dict[str, Any], old: Any) -> tuple[Any, Any]:
    """Return the new states of some sequences and their outputs, from their old states in float32."""

    def wide(name: str) -> Any:
        return arrays[name].astype(jnp.float32)

    def by_channel(name: str) -> Any:
        """Give a parameter (H,) an axis of headdim; one that has it stays as it is."""
        value = wide(name)
        return value[..., None] if value.ndim < len(channels) else value

    def by_head(name: str) -> Any:
        """Give B or C an axis of heads: (b, H, 1, N)."""
        grouped = wide(name).reshape(x.shape[0], problem.ngroups, 1, problem.dstate)
        repeated = jnp.repeat(grouped, problem.nheads // problem.ngroups, axis=1)
        return repeated if problem.heads_axis else repeated[:, 0]

    x, dt, A = wide("x"), wide("dt"), wide("A")
    channels = x.shape[1:]
    dt = dt[..., None] if dt.ndim < x.ndim else dt
    if "dt_bias" in arrays:
        dt = dt + by_channel("dt_bias")
    if problem.options.dt_softplus:
        # Above 20 the exponential is not needed, and must not overflow in the branch that is not selected either. Not
        # by jnp.minimum, which passes half of a gradient on where its arguments are equal.
        large = dt > 20
        dt = jnp.where(large, dt, jnp.log1p(jnp.exp(jnp.where(large, 0, dt))))
    A = A[:, None, None] if A.ndim < old.ndim - 1 else A
    new = old * jnp.exp(A * dt[..., None]) + (dt * x)[..., None] * by_head("B")
    out = jnp.sum(new * by_head("C"), axis=-1)
    if "D" in arrays:
        out = out + by_channel("D") * x
    if "z" in arrays:
        z = wide("z")
        out = out * z * jax.nn.sigmoid(z)
    return new, out.astype(arrays["x"].dtype)


# --- Where to ---

# An array of places has -1 where nothing is loaded or stored; None stands for each sequence's own number.


def _stored_each_token(problem: Problem, arrays: dict[str, Any]) -> dict[str, Any]:
    """Return the arrays that are stored to after each token, with one leading axis."""
    written = {"state": arrays["state"]} if "dst_state_batch_indices" in problem.tables else {}
    if "intermediate_states" in arrays:
        buffer = arrays["intermediate_states"]
        written["intermediate_states"] = buffer.reshape(buffer.shape[0] * buffer.shape[1], *buffer.shape[2:])
    return written


def _places(
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


def _final_slots(problem: Problem, arrays: dict[str, Any], read: Any) -> Any:
    """Return the slots that the final states go to."""
    if "dst_state_batch_indices" not in arrays:
        return read
    final = slots(jnp, problem, arrays["dst_state_batch_indices"])
    return final if read is None else jnp.where(read >= 0, final, -1)


def _results(
    problem: Problem, arrays: dict[str, Any], read: Any, written: dict[str, Any], states: Any, out: Any
) -> dict[str, Any]:
    """Return the arrays as they are after the call, with the final states stored where it has tokens."""
    results = {name: array.reshape(arrays[name].shape) for name, array in written.items()}
    if "state" in problem.results and "state" not in written and problem.tokens:
        results["state"] = _store(arrays["state"], _final_slots(problem, arrays, read), states)
    return arrays | results | {"out": out}


def _load(problem: Problem, arrays: dict[str, Any], places: Any) -> Any:
    """Return states in float32; zeros for a padding index and for a sequence without an initial state."""
    state, has_state = arrays["state"], arrays.get("has_initial_state")
    if places is not None:
        has_state = places >= 0 if has_state is None else has_state & (places >= 0)
        if problem.slots == 0:
            return jnp.zeros((problem.sequences, *state.shape[1:]), jnp.float32)
        rows = state[jnp.where(places >= 0, places, 0)].astype(jnp.float32)
    else:
        rows = state[: problem.sequences].astype(jnp.float32)
    return rows if has_state is None else jnp.where(has_state.reshape(-1, *[1] * (state.ndim - 1)), rows, 0)


def _store(array: Any, places: Any, rows: Any) -> Any:
    """Put rows into an array, in its dtype."""
    rows = rows.astype(array.dtype)
    if places is None:
        return array.at[: rows.shape[0]].set(rows)
    # A padding index goes past the end, where the scatter drops it; each to a place of its own, because XLA writes
    # faster where no two rows go to one place.
    dropped = array.shape[0] + jnp.arange(rows.shape[0], dtype=places.dtype)
    return array.at[jnp.where(places >= 0, places, dropped)].set(rows, mode="drop", unique_indices=True)
