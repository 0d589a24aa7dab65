"""The matrix form: a sequence's tokens in chunks, by products of matrices, for A, dt and dt_bias that are tied.

Within a chunk whose state is S before its first token, with c the sums of A * dt up to each token:

    y[t] = sum over s <= t of exp(c[t] - c[s]) (C[t] . B[s]) dt[s] x[s]  +  exp(c[t]) C[t] . S
    S    = exp(c[last]) S  +  sum over s of exp(c[last] - c[s]) dt[s] x[s] B[s]
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssu_bridge.backends.xla import arithmetic, storage
from ssu_bridge.backends.xla.forms import Chunking
from ssu_bridge.core.problem import Problem

# What is smaller than this is 0 as the exponent of a decay, and as that of any which goes on from it.
_LEAST_EXPONENT = -256.0
# Multiples of this are summed without rounding, as many as a chunk has tokens.
_COARSE = 2.0**-8


def run(problem: Problem, chunking: Chunking, arrays: dict[str, Any], read: Any) -> dict[str, Any]:
    """Return a call's arrays as they are after it, and its output."""
    run = {"multi": _multi, "packed": _packed}[problem.layout]
    return run(problem, chunking, arrays, read)


def _multi(problem: Problem, chunking: Chunking, arrays: dict[str, Any], read: Any) -> dict[str, Any]:
    """All sequences side by side, one chunk after another."""

    def body(carry: Any, chunk: Any) -> tuple[Any, Any]:
        states, written = carry
        tokens, places = chunk
        states, y = _chunk(problem, arrays["A"], states, tokens)
        written = {name: storage.store(array, places[name], states) for name, array in written.items()}
        return (states, written), y

    tokens = jax.tree.map(functools.partial(_cut, chunking), tokens_of(problem, arrays))
    last = _last_tokens(chunking, tokens.x.shape[0], problem.tokens)
    places = storage.places(problem, arrays, read, jnp.arange(problem.sequences)[None], last, True)
    carry = storage.load(problem, arrays, read), storage.stored_each_token(problem, arrays)
    (states, written), y = jax.lax.scan(body, carry, (tokens, places))
    out = arithmetic.finished(problem, arrays, _joined(chunking, y, problem.tokens))
    return storage.results(problem, arrays, read, written, states, out)


def _packed(problem: Problem, chunking: Chunking, arrays: dict[str, Any], read: Any) -> dict[str, Any]:
    """One chunk after another, each of one sequence; a row of no sequence has zeros for its output.

    Of sequences that share rows, results are undefined: a row is computed for the first of its sequences alone.
    """
    if not problem.sequences:
        return arrays | {"out": jnp.zeros_like(arrays["x"])}
    owners = storage.row_owners(problem, arrays)
    arrays = storage.owned_rows(arrays, owners)
    table = _chunks_of(problem, chunking, owners)
    places = storage.places(problem, arrays, read, table.sequence, table.last, table.is_owned)
    written = storage.stored_each_token(problem, arrays)
    if "state" in problem.results:
        final = storage.final_slots(problem, arrays, read)
        final = table.sequence if final is None else final[table.sequence]
        written["state"] = arrays["state"]
        places["state"] = jnp.where(table.is_owned & table.ends, final, -1)
    # Loaded before the first store: chunk by chunk, XLA would copy the state.
    start = storage.load(problem, arrays, read)

    def body(carry: Any, chunk: Any) -> tuple[Any, Any]:
        states, written = carry
        tokens, places, sequence, begins = chunk
        states = jnp.where(begins, start[sequence], states[0])[None]
        states, y = _chunk(problem, arrays["A"], states, jax.tree.map(lambda token: token[None], tokens))
        written = {name: storage.store(array, places[name][None], states) for name, array in written.items()}
        return (states, written), y[0]

    # A row that is not the chunk's is zeros: it adds nothing to a state, and does not decay it.
    tokens = jax.tree.map(lambda a: a.at[table.rows].get(mode="fill", fill_value=0), tokens_of(problem, arrays))
    carry = jnp.zeros_like(start[:1]), written
    (_, written), y = jax.lax.scan(body, carry, (tokens, places, table.sequence, table.begins))
    y = jnp.where(owners.is_owned[:, None, None], y[_chunk_of_rows(chunking, owners, table.first)], 0)
    return storage.results(problem, arrays, read, written, None, arithmetic.finished(problem, arrays, y))


# --- One chunk ---

# Float32 as it is: for a GPU the default is fewer bits.
product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Tokens(NamedTuple):
    """What a chunk needs of its tokens, each with the same leading axes."""

    x: Any
    dt: Any
    B: Any
    C: Any


def tokens_of(problem: Problem, arrays: dict[str, Any]) -> Tokens:
    """Return the tokens of a call, with the leading axes of its x."""
    x, B, C = (arrays[name] for name in ("x", "B", "C"))
    groups = (*x.shape[:-2], problem.ngroups, problem.dstate)
    return Tokens(x, arithmetic.step_sizes(problem, arrays)[..., 0], B.reshape(groups), C.reshape(groups))


def _chunk(problem: Problem, A: Any, states: Any, tokens: Tokens) -> tuple[Any, Any]:
    """Return the states (b, H, P, N) after a chunk of tokens (b, t, ...), and what y has of the states, (b, t, H, P).

    What lies between them is computed anew for a gradient, because it is larger than they are.
    """
    advanced = jax.checkpoint(functools.partial(_advanced, problem), prevent_cse=False)
    after: tuple[Any, Any] = advanced(A, states, tokens)
    return after


def _advanced(problem: Problem, A: Any, states: Any, tokens: Tokens) -> tuple[Any, Any]:
    x, dt, B, C = (array.astype(jnp.float32) for array in tokens)
    sequences, length = x.shape[:2]
    groups = (problem.ngroups, problem.nheads // problem.ngroups)
    rows = groups[1] * problem.headdim
    from_start, between, to_end = decays(A.astype(jnp.float32).reshape(-1) * dt)
    added = dt[..., None] * x

    # Axes: b sequences, t and s tokens, g groups, r heads of a group, p of headdim, n of dstate, q = r p.
    pairs = product("btgn,bsgn->bgts", C, B)[:, :, None] * between.reshape(sequences, *groups, length, length)
    y = product("bgrts,bsgrp->btgrp", pairs, added.reshape(sequences, length, *groups, problem.headdim))
    by_group = states.reshape(sequences, problem.ngroups, rows, problem.dstate)
    of_start = product("btgn,bgqn->btgq", C, by_group).reshape(x.shape)
    left = (added * to_end[..., None]).reshape(sequences, length, problem.ngroups, rows)
    new = product("bsgq,bsgn->bgqn", left, B).reshape(states.shape)
    states = states * from_start[:, -1, :, None, None] + new
    return states, y.reshape(x.shape) + of_start * from_start[..., None]


def decays(exponents: Any) -> tuple[Any, Any, Any]:
    """Return how much of a state is left, from the exponents of each token (b, t, H).

    That is from a chunk's start to after each token, (b, t, H); from after one to after another, (b, H, t, t), 0 where
    that is before; and from each to the end. Each is as exact as its own exponent, although it is a difference of sums:
    a sum's coarse part is exact, and the rest is small.
    """
    exponents = jnp.where(exponents < _LEAST_EXPONENT, _LEAST_EXPONENT, exponents)
    coarse = jax.lax.stop_gradient(jnp.round(exponents / _COARSE) * _COARSE)
    sums = jnp.cumsum(coarse, axis=1), jnp.cumsum(exponents - coarse, axis=1)
    to_end = sum(part[:, -1:] - part for part in sums)
    by_head = [jnp.moveaxis(part, 1, 2) for part in sums]
    coarse, fine = (part[..., :, None] - part[..., None, :] for part in by_head)
    between = coarse + fine
    # Before the exponential, which could overflow in what is not used, and is then no number times 0 in a gradient.
    is_later = jnp.tril(jnp.ones(between.shape[-2:], bool))
    between = jnp.where(is_later, jnp.exp(jnp.where(is_later, between, 0)), 0)
    return jnp.exp(sums[0] + sums[1]), between, jnp.exp(to_end)


# --- Chunks of sequences side by side ---


def _cut(chunking: Chunking, array: Any) -> Any:
    """Cut an array (b, T, ...) into (chunks, b, size, ...), with zeros for tokens that are not there."""
    segment, count, size = chunking
    sequences, tokens, *rest = array.shape
    segments = -(-tokens // segment)
    array = _padded(array, 1, segments * segment).reshape(sequences, segments, segment, *rest)
    array = _padded(array, 2, count * size).reshape(sequences, segments * count, size, *rest)
    return jnp.moveaxis(array[:, : _number(chunking, tokens)], 1, 0)


def _joined(chunking: Chunking, array: Any, tokens: Any) -> Any:
    """Return what was cut into (chunks, b, size, ...) as (b, T, ...) again."""
    segment, count, size = chunking
    _, sequences, _, *rest = array.shape
    segments = -(-tokens // segment)
    array = _padded(jnp.moveaxis(array, 0, 1), 1, segments * count)
    array = array.reshape(sequences, segments, count * size, *rest)[:, :, :segment]
    return array.reshape(sequences, segments * segment, *rest)[:, :tokens]


def _number(chunking: Chunking, tokens: Any) -> Any:
    """Return in how many chunks so many tokens are cut."""
    segment, count, size = chunking
    return tokens // segment * count + -(-(tokens % segment) // size)


def _last_tokens(chunking: Chunking, chunks: Any, tokens: Any) -> Any:
    """Return the number of each chunk's last token, (chunks, 1)."""
    segment, count, size = chunking
    chunk = jnp.arange(chunks)[:, None]
    end = jnp.minimum(chunk % count * size + size, segment)
    return jnp.minimum(chunk // count * segment + end, tokens) - 1


def _padded(array: Any, axis: int, length: Any) -> Any:
    """Put zeros behind an axis up to a length."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - array.shape[axis])
    return jnp.pad(array, widths)


# --- Chunks of packed sequences ---


class _Table(NamedTuple):
    """What each chunk of packed sequences is: of as many as there can be, those that are not there are not owned.

    Attributes:
        first: (b,), the number of each sequence's first chunk; all others are (chunks, ...).
        sequence: that it is of.
        begins, ends: whether it is that one's first, or last.
        last: the number of its last token there.
        rows: (chunks, size), those of its tokens; one that does not exist for none.
        is_owned: whether it is there.
    """

    first: Any
    sequence: Any
    begins: Any
    ends: Any
    last: Any
    rows: Any
    is_owned: Any


def _chunks_of(problem: Problem, chunking: Chunking, owners: storage.Owners) -> _Table:
    segment, count, size = chunking
    numbers = _number(chunking, owners.lengths)
    first = jnp.cumsum(numbers) - numbers
    # Each sequence has at most one that is not full.
    chunk = jnp.arange(problem.tokens * count // segment + problem.sequences)
    sequence = jnp.sum(first <= chunk[:, None], axis=1) - 1
    own = chunk - first[sequence]
    is_owned = own < numbers[sequence]
    token = own // count * segment + own % count * size
    length = jnp.minimum(jnp.minimum(segment - own % count * size, owners.lengths[sequence] - token), size)
    within = jnp.arange(size)
    rows = (owners.starts[sequence] + token)[:, None] + within
    rows = jnp.where(is_owned[:, None] & (within < length[:, None]), rows, problem.tokens)
    return _Table(first, sequence, own == 0, own + 1 == numbers[sequence], token + length - 1, rows, is_owned)


def _chunk_of_rows(chunking: Chunking, owners: storage.Owners, first: Any) -> tuple[Any, Any]:
    """Return the chunk of each packed row, and its place there; any for a row of no sequence."""
    segment, count, size = chunking
    token = jnp.where(owners.is_owned, owners.token, 0)
    chunk = first[owners.sequence] + token // segment * count + token % segment // size
    return jnp.where(owners.is_owned, chunk, 0), token % segment % size
