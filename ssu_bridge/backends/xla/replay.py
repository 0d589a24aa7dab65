"""Replay: a call's new tokens from a checkpoint and the tokens since, by products of matrices.

The pending tokens and the new ones make one chunk, in which a row that is not pending has a step size of 0. With c the
sums of A * dt from the checkpoint on, up to each token:

    y[t] = exp(c[t]) C[t] . checkpoint  +  sum over s <= t of exp(c[t] - c[s]) (C[t] . B[s]) dt[s] x[s]
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssu_bridge.backends.xla import arithmetic, storage
from ssu_bridge.backends.xla.chunks import Tokens, decays, product, tokens_of
from ssu_bridge.core.arguments import CURSOR, RINGS
from ssu_bridge.core.problem import Problem
from ssu_bridge.core.replay import ReplayCursor, flushes, phase
from ssu_bridge.errors import UnsupportedError


def run(problem: Problem, arrays: dict[str, Any], read: Any) -> dict[str, Any]:
    """Return a call's arrays as they are after it, and its output."""
    if not problem.sequences:
        return arrays | {"out": jnp.zeros_like(arrays["x"])}
    results: dict[str, Any] = arrays | _not_differentiable(functools.partial(_step, problem))(arrays, read)
    return results


def _not_differentiable(function: Any) -> Any:
    guarded: Any = jax.custom_jvp(function)

    @guarded.defjvp  # type: ignore[untyped-decorator]
    def refuse(*_: Any) -> Any:
        raise UnsupportedError("backend xla: a ReplayState cannot be differentiated; use a plain state")

    return guarded


def _step(problem: Problem, arrays: dict[str, Any], read: Any) -> dict[str, Any]:
    """Return the results of a call whose sequences have these slots: -1 for a padding index, None for their numbers."""
    if not problem.slots:  # a padding index reads some slot, of which nothing is used
        held = arrays | {name: _one(arrays[name]) for name in ("state", *RINGS, *CURSOR)}
        return {"out": _step(dataclasses.replace(problem, slots=1), held, read)["out"]}
    slots = jnp.arange(problem.sequences) if read is None else read
    start, pending = (arrays[name] for name in CURSOR)
    cursor = ReplayCursor(start, pending, problem.options.replay_window, problem.options.replay_tokens)
    is_stored, place = slots >= 0, jnp.where(slots >= 0, slots, 0)
    start, pending = phase(jnp, cursor, place)
    pending = jnp.where(is_stored, pending, 0)
    new = _new_tokens(problem, arrays)
    row = ((start + pending)[:, None] + jnp.arange(new.tokens.x.shape[1])) % cursor.length
    to = jnp.where(is_stored[:, None] & new.is_token, slots[:, None], -1)
    values = (new.tokens.x, new.tokens.B, new.tokens.dt)
    # Read after they are written, which are other rows: the other way round XLA would copy them.
    rings = {n: _stored(arrays[n], to, row, rows) for n, rows in zip(RINGS, values, strict=True)}
    chunk = _chunk(_pending_tokens(rings, cursor, place, start, pending), new)
    from_start, between, _ = decays(arrays["A"].astype(jnp.float32).reshape(-1) * chunk.dt)
    last = cursor.window - 1
    flushed = is_stored & flushes(cursor, pending, new.lengths)

    def keep(state: Any) -> tuple[Any, Any]:
        old = storage.load(problem, arrays | {"state": state}, read)
        return state, _outputs(problem, old, chunk, from_start, between)

    def flush(state: Any) -> tuple[Any, Any]:
        old = storage.load(problem, arrays | {"state": state}, read)
        after = _advanced(problem, old, chunk, from_start[:, last], between[:, :, last, : cursor.window])
        y = _outputs(problem, old, chunk, from_start, between)
        return storage.store(state, jnp.where(flushed, slots, -1), after), y

    # Each reads the state by itself: XLA would copy one that is read outside of them, too.
    state, y = jax.lax.cond(jnp.any(flushed), flush, keep, arrays["state"])
    y = y[:, 0] if problem.layout == "single" else new.by_row(y)
    return rings | {"state": state, "out": arithmetic.finished(problem, new.owned(arrays), y)}


# --- Tokens ---


class _New(NamedTuple):
    """The new tokens of each sequence, (b, t, ...), which of them there are, and how many; owners of packed rows."""

    tokens: Tokens
    is_token: Any
    lengths: Any
    owners: storage.Owners | None

    def owned(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Return the arrays with zeros in packed rows of no sequence."""
        return arrays if self.owners is None else storage.owned_rows(arrays, self.owners)

    def by_row(self, y: Any) -> Any:
        """Return what is (b, t, ...) with the leading axes of x; zeros in a row of no sequence."""
        if self.owners is None:
            return y
        is_owned = self.owners.is_owned.reshape(-1, *[1] * (y.ndim - 2))
        return jnp.where(is_owned, y[self.owners.sequence, jnp.where(self.owners.is_owned, self.owners.token, 0)], 0)


def _new_tokens(problem: Problem, arrays: dict[str, Any]) -> _New:
    if problem.layout != "packed":
        tokens = tokens_of(problem, arrays)
        if problem.layout == "single":
            tokens = jax.tree.map(lambda array: array[:, None], tokens)
        sequences, count = tokens.x.shape[:2]
        return _New(tokens, jnp.ones((sequences, count), bool), jnp.full(sequences, count, jnp.int32), None)
    owners = storage.row_owners(problem, arrays)
    within = jnp.arange(problem.longest)
    is_token = within < owners.lengths[:, None]
    rows = jnp.where(is_token, owners.starts[:, None] + within, problem.tokens)
    tokens = tokens_of(problem, storage.owned_rows(arrays, owners))
    tokens = jax.tree.map(functools.partial(_rows_of, rows), tokens)
    return _New(tokens, is_token, owners.lengths, owners)


def _rows_of(rows: Any, array: Any) -> Any:
    """Return rows of an array, zeros for one beyond its last; it may have none, which JAX does not index."""
    if array.shape[0] == 0:
        return jnp.zeros((*rows.shape, *array.shape[1:]), array.dtype)
    return array.at[rows].get(mode="fill", fill_value=0)


def _pending_tokens(arrays: dict[str, Any], cursor: ReplayCursor, place: Any, start: Any, pending: Any) -> Any:
    """Return x, B and dt of a window of rows of each sequence, with zeros in those that are not pending."""
    number = jnp.arange(cursor.window)
    rows = (start[:, None] + number) % cursor.length
    is_pending = number < pending[:, None]
    # An index on either side of an axis puts its own axes first.
    found = (arrays[name][place[:, None], :, rows] for name in RINGS)
    return [jnp.where(is_pending.reshape(*is_pending.shape, *[1] * (a.ndim - 2)), a, 0) for a in found]


def _chunk(pending: Any, new: _New) -> Tokens:
    """Return the pending tokens followed by the new ones; C has the new ones alone."""
    dt = jnp.where(new.is_token[..., None], new.tokens.dt, 0)
    pairs = zip(pending, (new.tokens.x, new.tokens.B, dt), strict=True)
    x, B, dt = (jnp.concatenate([old.astype(jnp.float32), token.astype(jnp.float32)], axis=1) for old, token in pairs)
    return Tokens(x, dt, B, new.tokens.C.astype(jnp.float32))


# --- Products ---

# Axes: b sequences, t new tokens, s all tokens, g groups, r heads of a group, p of headdim, n of dstate, q = r p.


def _outputs(problem: Problem, checkpoints: Any, chunk: Tokens, from_start: Any, between: Any) -> Any:
    """Return what y has of the states, (b, t, H, P), for the new tokens."""
    sequences, length = chunk.x.shape[:2]
    count = chunk.C.shape[1]
    first = length - count
    groups = (problem.ngroups, problem.nheads // problem.ngroups)
    added = (chunk.dt[..., None] * chunk.x).reshape(sequences, length, *groups, problem.headdim)
    decay = between[:, :, first:].reshape(sequences, *groups, count, length)
    pairs = product("btgn,bsgn->bgts", chunk.C, chunk.B)[:, :, None] * decay
    y = product("bgrts,bsgrp->btgrp", pairs, added)
    by_group = checkpoints.reshape(sequences, problem.ngroups, -1, problem.dstate)
    if count == 1:  # read once: a product of matrices would be one of copies
        of_start = jnp.sum(by_group[:, None] * chunk.C[:, :, :, None], axis=-1)
    else:
        of_start = product("btgn,bgqn->btgq", chunk.C, by_group)
    of_start = of_start.reshape(sequences, count, *chunk.x.shape[2:])
    return y.reshape(of_start.shape) + of_start * from_start[:, first:, :, None]


def _advanced(problem: Problem, checkpoints: Any, chunk: Tokens, from_start: Any, to_end: Any) -> Any:
    """Return the checkpoints after the pending tokens, from how much is left of them (b, H) and of each token."""
    sequences, window = to_end.shape[0], to_end.shape[2]
    weights = chunk.dt[:, :window] * jnp.moveaxis(to_end, 1, 2)
    left = (weights[..., None] * chunk.x[:, :window]).reshape(sequences, window, problem.ngroups, -1)
    new = product("bsgq,bsgn->bgqn", left, chunk.B[:, :window]).reshape(checkpoints.shape)
    return checkpoints * from_start[:, :, None, None] + new


# --- Stores ---


def _one(array: Any) -> Any:
    return jnp.zeros((1, *array.shape[1:]), array.dtype)


def _stored(ring: Any, place: Any, rows: Any, values: Any) -> Any:
    """Return a ring with values (b, t, ...) in rows (b, t) of slots (b, t); -1 stands for no slot."""
    # Past the end, each in a place of its own: as in storage.
    dropped = ring.shape[0] + jnp.arange(rows.size, dtype=place.dtype).reshape(rows.shape)
    place = jnp.where(place >= 0, place, dropped)
    return ring.at[place, :, rows].set(values.astype(ring.dtype), mode="drop", unique_indices=True)
