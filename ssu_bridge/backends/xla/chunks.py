"""A sequence's tokens in chunks: by products of matrices for A, dt and dt_bias that are tied, else by a scan.

Within a chunk whose state is S before its first token, with c the sums of A * dt up to each token:

    y[t] = sum over s <= t of exp(c[t] - c[s]) (C[t] . B[s]) dt[s] x[s]  +  exp(c[t]) C[t] . S
    S    = exp(c[last]) S  +  sum over s of exp(c[last] - c[s]) dt[s] x[s] B[s]
"""

import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssu_bridge.backends.xla import arithmetic, storage
from ssu_bridge.backends.xla.forms import Chunking
from ssu_bridge.core.problem import Problem

# What is smaller than this is 0 as the exponent of a decay, and as that of any which goes on from it.
_LEAST_EXPONENT = -256.0
# Tokens whose chunks are computed at a time: what lies between the tokens of a chunk takes memory.
_AT_A_TIME = 8192
# Multiples of this are summed without rounding, as many as a chunk has tokens.
_COARSE = 2.0**-8
# In so many parts of dstate a product of two tokens is added up.
_PARTS = 4


def run(problem: Problem, chunking: Chunking, arrays: dict[str, Any], read: Any) -> dict[str, Any]:
    """Return a call's arrays as they are after it, and its output."""
    run = {"multi": _multi, "packed": _packed}[problem.layout]
    return run(problem, chunking, arrays, read)


def _multi(problem: Problem, chunking: Chunking, arrays: dict[str, Any], read: Any) -> dict[str, Any]:
    """All sequences side by side."""
    tokens = jax.tree.map(functools.partial(_cut, chunking), tokens_of(problem, arrays))
    last = _last_tokens(chunking, tokens.x.shape[0], problem.tokens)
    places = storage.places(problem, arrays, read, jnp.arange(problem.sequences)[None], last, True)
    written, start = storage.stored_each_token(problem, arrays), storage.load(problem, arrays, read)
    after = _run(problem, chunking, arrays["A"], _Chunks(tokens, places), start, written)
    out = arithmetic.finished(problem, arrays, _joined(chunking, after.y, problem.tokens))
    return storage.results(problem, arrays, read, after.written, after.states, out)


def _packed(problem: Problem, chunking: Chunking, arrays: dict[str, Any], read: Any) -> dict[str, Any]:
    """Compute packed sequences in chunks of one sequence each; a row of no sequence has zeros for its output.

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
    # A row that is not the chunk's is zeros: it adds nothing to a state, and does not decay it.
    tokens = jax.tree.map(lambda a: a.at[table.rows].get(mode="fill", fill_value=0), tokens_of(problem, arrays))
    tokens, places = jax.tree.map(lambda array: array[:, None], (tokens, places))
    chunks = _Chunks(tokens, places, start, table.begins, table.sequence)
    after = _run(problem, chunking, arrays["A"], chunks, jnp.zeros_like(start[:1]), written)
    y = after.y[:, 0][_chunk_of_rows(chunking, owners, table.first)]
    y = jnp.where(owners.is_owned.reshape(-1, *[1] * (y.ndim - 1)), y, 0)
    return storage.results(problem, arrays, read, after.written, None, arithmetic.finished(problem, arrays, y))


# --- Chunks one after another, or all at once but for the states that go from one to the next ---


class _Chunks(NamedTuple):
    """What chunks are computed from, each with an axis of chunks and one of b sequences.

    Attributes:
        tokens: (chunks, b, t, ...).
        places: (chunks, b), where the states after each are stored.
        start: (sequences, ...), states that some chunks begin from, and not from those after the one before.
        begins, sequence: (chunks,), whether one does, and from which. All None where none does.
    """

    tokens: "Tokens"
    places: dict[str, Any]
    start: Any = None
    begins: Any = None
    sequence: Any = None

    def entered(self, states: Any, begins: Any, sequence: Any) -> Any:
        """Return the states before a chunk, of those after the one before it."""
        return states if begins is None else jnp.where(begins, self.start[sequence][None], states)


class _After(NamedTuple):
    """What chunks leave: the states after the last, the arrays that states are stored in, and y (chunks, b, t, ...)."""

    states: Any
    written: dict[str, Any]
    y: Any


def _run(problem: Problem, chunking: Chunking, A: Any, chunks: _Chunks, states: Any, written: dict[str, Any]) -> _After:
    if chunking.at_once:
        return _at_once(problem, A, chunks, states, written)
    advanced = _anew(functools.partial(_scanned if chunking.scanned else _advanced, problem, A))

    def body(carry: Any, chunk: Any) -> tuple[Any, Any]:
        states, written = carry
        tokens, places, *begins = chunk
        states, y = advanced(chunks.entered(states, *begins), tokens)
        written = {name: storage.store(array, places[name], states) for name, array in written.items()}
        return (states, written), y

    (states, written), y = jax.lax.scan(
        body, (states, written), (chunks.tokens, chunks.places, chunks.begins, chunks.sequence)
    )
    return _After(states, written, y)


def _at_once(problem: Problem, A: Any, chunks: _Chunks, states: Any, written: dict[str, Any]) -> _After:
    def body(states: Any, chunk: Any) -> tuple[Any, Any]:
        from_start, new, *begins = chunk
        before = chunks.entered(states, *begins)
        after = _decayed(before, from_start) + new
        return after, (before, after)

    within = _each(functools.partial(_within, problem, A), chunks.tokens)
    rows = within.from_start[:, :, -1], within.new, chunks.begins, chunks.sequence
    states, (before, after) = jax.lax.scan(body, states, rows)
    of_start = _each(functools.partial(_of_start, problem), before, chunks.tokens.C, within.from_start)
    after = after.reshape(after.shape[0] * after.shape[1], *after.shape[2:])
    written = {n: storage.store(array, chunks.places[n].reshape(-1), after) for n, array in written.items()}
    return _After(states, written, within.y + of_start)


def _each(function: Any, *arrays: Any) -> Any:
    """Return what a function makes of each chunk: of as many at a time as have so many tokens."""
    chunks, sequences, length = jax.tree.leaves(arrays)[-1].shape[:3]
    count = max(_AT_A_TIME // max(sequences * length, 1), 1)
    if count >= chunks:
        return jax.vmap(_anew(function))(*arrays)
    return jax.lax.map(lambda chunk: _anew(function)(*chunk), arrays, batch_size=count)


def _anew(function: Any) -> Any:
    """Return a function of which what lies in between is computed anew for a gradient: it is larger than the rest."""
    return jax.checkpoint(function, prevent_cse=False)


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
    groups = (*x.shape[: -2 if problem.heads_axis else -1], problem.ngroups, problem.dstate)
    dt = arithmetic.step_sizes(problem, arrays)
    return Tokens(x, dt[..., 0] if dt.shape[-1] == 1 else dt, B.reshape(groups), C.reshape(groups))


class _Within(NamedTuple):
    """What a chunk makes of its tokens alone, whatever the states are before it.

    Attributes:
        y: (b, t, H, P).
        new: (b, H, P, N), what is added to the states.
        from_start: (b, t, H), how much of the states before it is left after each token.
    """

    y: Any
    new: Any
    from_start: Any


def _advanced(problem: Problem, A: Any, states: Any, tokens: Tokens) -> tuple[Any, Any]:
    """Return the states (b, H, P, N) after a chunk of tokens (b, t, ...), and y (b, t, H, P) but for D."""
    within = _within(problem, A, tokens)
    y = within.y + _of_start(problem, states, tokens.C, within.from_start)
    return _decayed(states, within.from_start[:, -1]) + within.new, y


# Axes: b sequences, t and s tokens, g groups, r heads of a group, p of headdim, n of dstate, q = r p.


def _within(problem: Problem, A: Any, tokens: Tokens) -> _Within:
    x, dt, B, C = (array.astype(jnp.float32) for array in tokens)
    sequences, length = x.shape[:2]
    groups = (problem.ngroups, problem.nheads // problem.ngroups)
    from_start, between, to_end = decays(A.astype(jnp.float32).reshape(-1) * dt)
    between = (between * jnp.moveaxis(dt, 1, 2)[:, :, None]).reshape(sequences, *groups, length, length)
    pairs = _of_pairs(C, B)[:, :, None] * between
    # Of a later token nothing is left in an earlier one's output, whatever its dt and B are.
    pairs = jnp.where(_is_later(dt, 0), pairs, 0)
    y = product("bgrts,bsgrp->btgrp", pairs, x.reshape(sequences, length, *groups, problem.headdim))
    left = x * (dt * to_end)[..., None]
    left = left.reshape(sequences, length, problem.ngroups, groups[1] * problem.headdim)
    new = product("bsgq,bsgn->bgqn", left, B).reshape(sequences, problem.nheads, problem.headdim, problem.dstate)
    return _Within(y.reshape(x.shape), new, from_start)


def _of_pairs(C: Any, B: Any) -> Any:
    """Return C[t] . B[s] for each two tokens, (b, g, t, s).

    Where little is left of earlier tokens, y is one of these, and its error that of this sum over dstate. XLA may add
    that up one term after another, which in parts loses half as much. The parts are added as an expression, which is
    fused with what follows: a reduction would be fused as a loop for each head.
    """
    parts = math.gcd(C.shape[-1], _PARTS)
    C, B = (array.reshape(*array.shape[:-1], parts, array.shape[-1] // parts) for array in (C, B))
    return functools.reduce(operator.add, product("btgkn,bsgkn->kbgts", C, B))


def _of_start(problem: Problem, states: Any, C: Any, from_start: Any) -> Any:
    """Return what y has of the states before a chunk, (b, t, H, P)."""
    rows = problem.nheads // problem.ngroups * problem.headdim
    by_group = states.reshape(states.shape[0], problem.ngroups, rows, problem.dstate)
    y = product("btgn,bgqn->btgq", C.astype(jnp.float32), by_group)
    return y.reshape(*from_start.shape, problem.headdim) * from_start[..., None]


def _decayed(states: Any, left: Any) -> Any:
    """Return states of which so much (b, H) is left."""
    return states * left[..., None, None]


def _scanned(problem: Problem, A: Any, states: Any, tokens: Tokens) -> tuple[Any, Any]:
    """Do the same as ``_advanced`` with the state after each token, for any A and dt."""
    x, dt, B, C = (array.astype(jnp.float32) for array in tokens)
    dt = dt if dt.ndim == x.ndim else dt[..., None]
    A = A.astype(jnp.float32)
    A = A.reshape(-1, 1, 1) if "A" in problem.tied else A

    def by_head(array: Any) -> Any:
        """Give B or C an axis of heads, where x has one, and one of headdim."""
        repeated = jnp.repeat(array[..., None, :], problem.nheads // problem.ngroups, axis=2)
        return repeated if problem.heads_axis else repeated[:, :, 0]

    left, new = jnp.exp(A * dt[..., None]), (dt * x)[..., None] * by_head(B)
    new = new.at[:, 0].add(left[:, 0] * states)
    _, after = jax.lax.associative_scan(_then, (left, new), axis=1)
    return after[:, -1], jnp.sum(after * by_head(C), axis=-1)


def _then(first: tuple[Any, Any], second: tuple[Any, Any]) -> tuple[Any, Any]:
    """Return what is left of a state after two steps, and what they add."""
    return first[0] * second[0], first[1] * second[0] + second[1]


@jax.custom_jvp
def decays(exponents: Any) -> tuple[Any, Any, Any]:
    """Return how much of a state is left, from the exponents of each token (b, t, H).

    That is from a chunk's start to after each token, (b, t, H); from after one to after another, (b, H, t, t), 0 where
    that is before; and from each to the end. Each is as exact as its own exponent, although it is a difference of sums:
    a sum's coarse part is exact, and the rest is small.
    """
    exponents = jnp.where(exponents < _LEAST_EXPONENT, _LEAST_EXPONENT, exponents)
    coarse = jnp.round(exponents / _COARSE) * _COARSE
    sums = jnp.cumsum(coarse, axis=1), jnp.cumsum(exponents - coarse, axis=1)
    to_end = sum(part[:, -1:] - part for part in sums)
    by_head = [jnp.moveaxis(part, 1, 2) for part in sums]
    coarse, fine = (part[..., :, None] - part[..., None, :] for part in by_head)
    is_later = _is_later(exponents, 0)
    # Before the exponential, which could overflow in what is not used.
    between = jnp.where(is_later, jnp.exp(jnp.where(is_later, coarse + fine, 0)), 0)
    return jnp.exp(sums[0] + sums[1]), between, jnp.exp(to_end)


@decays.defjvp
def _slopes_of_decays(exponents: Any, slopes: Any) -> tuple[Any, Any]:
    """Sum the slopes between two tokens as such: a gradient by differences of sums would lose what cancels in those."""
    (exponents,), (slopes,) = exponents, slopes
    slopes = jnp.where(exponents < _LEAST_EXPONENT, 0, slopes)
    own = jnp.where(_is_later(exponents, 1), jnp.moveaxis(slopes, 1, 2)[..., None], 0)
    between = product("tk,bhks->bhts", _is_later(exponents, 0).astype(own.dtype), own)
    sums = jnp.cumsum(slopes, axis=1), between, jnp.moveaxis(between[:, :, -1], 2, 1)
    found = decays(exponents)
    return found, tuple(decay * part for decay, part in zip(found, sums, strict=True))


def _is_later(exponents: Any, least: int) -> Any:
    """Return for each two tokens (t, t) of a chunk whether the first comes so many or more after the second."""
    length = exponents.shape[1]
    return jnp.tril(jnp.ones((length, length), bool), -least)


# --- Chunks of sequences side by side ---


def _cut(chunking: Chunking, array: Any) -> Any:
    """Cut an array (b, T, ...) into (chunks, b, size, ...), with zeros for tokens that are not there."""
    segment, count, size = chunking[:3]
    sequences, tokens, *rest = array.shape
    segments = -(-tokens // segment)
    array = _padded(array, 1, segments * segment).reshape(sequences, segments, segment, *rest)
    array = _padded(array, 2, count * size).reshape(sequences, segments * count, size, *rest)
    return jnp.moveaxis(array[:, : _number(chunking, tokens)], 1, 0)


def _joined(chunking: Chunking, array: Any, tokens: Any) -> Any:
    """Return what was cut into (chunks, b, size, ...) as (b, T, ...) again."""
    segment, count, size = chunking[:3]
    _, sequences, _, *rest = array.shape
    segments = -(-tokens // segment)
    array = _padded(jnp.moveaxis(array, 0, 1), 1, segments * count)
    array = array.reshape(sequences, segments, count * size, *rest)[:, :, :segment]
    return array.reshape(sequences, segments * segment, *rest)[:, :tokens]


def _number(chunking: Chunking, tokens: Any) -> Any:
    """Return in how many chunks so many tokens are cut."""
    segment, count, size = chunking[:3]
    return tokens // segment * count + -(-(tokens % segment) // size)


def _last_tokens(chunking: Chunking, chunks: Any, tokens: Any) -> Any:
    """Return the number of each chunk's last token, (chunks, 1)."""
    segment, count, size = chunking[:3]
    chunk = jnp.arange(chunks)[:, None]
    end = jnp.minimum(chunk % count * size + size, segment)
    return jnp.minimum(chunk // count * segment + end, tokens) - 1


def _padded(array: Any, axis: int, length: Any) -> Any:
    """Pad an axis with trailing zeros up to a length."""
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
    segment, count, size = chunking[:3]
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
    segment, count, size = chunking[:3]
    token = jnp.where(owners.is_owned, owners.token, 0)
    chunk = first[owners.sequence] + token // segment * count + token % segment // size
    return jnp.where(owners.is_owned, chunk, 0), token % segment % size
