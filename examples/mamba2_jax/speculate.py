"""Decode speculatively: look up drafts in the text so far, verify several tokens in one call, keep those that hold.

What followed the last time that a text had the same tokens as at its end may follow again. A call takes the newest
token and those drafts together, and draws a token after each of them, as decoding one by one would. A draft that is
what was drawn is accepted, and so is the draw after the last such. That is the rule of rejection for drafts that are
certain: each is accepted with its probability, and else the token comes from the others. So the text is that of plain
decoding with the same seed, but for roundings: a call of several tokens adds up its products in another order.

No state is copied when drafts are rejected. The state after each token has a slot of its own, and the next call starts
from that of the last accepted one. Or, with ``replay``, no state is written in most calls: the inputs of the tokens
since the last one are kept, those of rejected drafts are overwritten.

    python -m mamba2_jax.generate --speculate 8 --temperature 0
    python -m mamba2_jax.generate --speculate 8 --replay 8 --temperature 0
    python -m mamba2_jax.benchmark --speculate 8
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ssu_bridge
from mamba2_jax import convolution, model
from mamba2_jax.config import Mamba2Config
from mamba2_jax.generate import PIECE, bucket, check_request, one_ahead, prefill
from mamba2_jax.sampling import DEFAULT, Sampling, sample


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How drafts are looked up.

    Attributes:
        tokens: of a verification, the newest of the text and the drafts, from 2 to 64.
        branches: how many continuations are verified together, as a tree; a divisor of the number of drafts.
        shortest: how many tokens at the end must stand in the text before, or else a single token is decoded.
        longest: how many are compared.
        replay: the window of a ReplayState, at least ``tokens``; None: a state after each token is stored.

    Raises:
        ValueError: one of them is no such number; the message names it.
    """

    tokens: int = 8
    branches: int = 1
    shortest: int = 3
    longest: int = 16
    replay: int | None = None

    def __post_init__(self) -> None:
        for name, least, most in (("tokens", 2, 64), ("branches", 1, 63), ("shortest", 1, 64), ("longest", 1, 64)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{name}: expected an int from {least} to {most}, got {value!r}")
        if (self.tokens - 1) % self.branches:
            raise ValueError(f"branches: expected a divisor of {self.tokens - 1} drafts, got {self.branches}")
        if self.longest < self.shortest:
            raise ValueError(f"longest: expected at least shortest, {self.shortest}, got {self.longest}")
        if self.replay is not None and (self.branches > 1 or self.replay < self.tokens):
            wanted = "None with a tree" if self.branches > 1 else f"at least tokens, {self.tokens}"
            raise ValueError(f"replay: expected {wanted}, got {self.replay}")

    @property
    def depth(self) -> int:
        """The drafts of a branch."""
        return (self.tokens - 1) // self.branches

    @property
    def sizes(self) -> dict[int, int]:
        """How many drafts of a branch are verified, by how many tokens stood in the text before."""
        if self.branches > 1 or self.tokens < 4:
            return {0: 0, self.shortest: self.depth}
        return {0: 0, self.shortest: self.tokens // 2 - 1, self.shortest + self.tokens // 2: self.depth}


def tree_depths(branches: int, depth: int) -> np.ndarray:
    """Return how many tokens after the newest of the text each token of a call is, (1 + branches * depth,)."""
    return np.array([0, *list(range(1, depth + 1)) * branches], np.int32)


def tree_parents(branches: int, depth: int) -> np.ndarray:
    """Return which token of a call each continues; -1 for the newest of the text."""
    depths = tree_depths(branches, depth)
    return np.where(depths > 1, np.arange(len(depths)) - 1, np.minimum(depths - 1, 0)).astype(np.int32)


class Found(NamedTuple):
    """Drafts (batch, branches, depth), and how many tokens (batch,) before the first branch's were the same."""

    drafts: Any
    matched: Any


def look_up(text: Any, lengths: Any, speculation: Speculation, xp: Any = jnp) -> Found:
    """Return what may follow texts: what followed the longest and latest of the same tokens before.

    Branches differ in their first token. Where there is nothing to look up, drafts are arbitrary tokens of the text.

    Args:
        text: (batch, capacity) integers, of which the first ``lengths`` (batch,), at least one, are a text.
        lengths: see there.
        speculation: see there.
        xp: ``numpy`` for NumPy arrays.
    """
    capacity, newest = text.shape[1], lengths[:, None] - 1
    places = xp.arange(capacity)[None]
    padded = xp.pad(text, ((0, 0), (speculation.longest, 0)), constant_values=-1)
    same, matched = places < newest, xp.zeros(text.shape, np.int32)
    for back in range(speculation.longest):
        start = speculation.longest - back
        own = xp.take_along_axis(padded, newest + start, axis=1)
        same = same & (padded[:, start : start + capacity] == own) & (newest >= back)
        matched = matched + same
    next_tokens = xp.roll(text, -1, axis=1)
    score = xp.where(places < newest, matched * capacity + places, -1)
    drafts, first = [], None
    for _ in range(speculation.branches):
        best = xp.argmax(score, axis=1)[:, None]
        # What repeats up to the end of the text goes on repeating.
        period = xp.maximum(newest - best, 1)
        drafts.append(xp.take_along_axis(text, best + 1 + xp.arange(speculation.depth) % period, axis=1))
        first = xp.take_along_axis(matched, best, axis=1)[:, 0] if first is None else first
        score = xp.where(next_tokens == drafts[-1][:, :1], -1, score)
    return Found(xp.stack(drafts, axis=1), first)


class Verified(NamedTuple):
    """What comes of a verification.

    Attributes:
        tokens: (batch, depth + 1), those that follow the text, of which the first ``accepted`` + 1 count.
        accepted: (batch,), how many drafts were.
        leaf: (batch,), the number of the last accepted token in the call.
    """

    tokens: jax.Array
    accepted: jax.Array
    leaf: jax.Array


def verify(drafts: jax.Array, drawn: jax.Array) -> Verified:
    """Accept the drafts that are what was drawn, up to the first that is not.

    Args:
        drafts: (batch, branches, depth).
        drawn: (batch, tokens), what was drawn after each token of the call.
    """
    batch, branches, depth = drafts.shape
    first = jnp.broadcast_to(drawn[:, None, :1], (batch, branches, 1))
    expected = jnp.concatenate([first, drawn[:, 1:].reshape(drafts.shape)], axis=2)[:, :, :depth]
    right = jnp.cumprod(drafts == expected, axis=2).sum(axis=2)
    branch = jnp.argmax(right, axis=1)
    accepted = jnp.take_along_axis(right, branch[:, None], axis=1)[:, 0].astype(jnp.int32)
    leaf = jnp.where(accepted > 0, branch * depth + accepted, 0)
    last = jnp.take_along_axis(drawn, leaf[:, None], axis=1)
    own = jnp.take_along_axis(drafts, branch[:, None, None], axis=1)[:, 0]
    tokens = jnp.where(jnp.arange(depth + 1) < accepted[:, None], jnp.pad(own, ((0, 0), (0, 1))), last)
    return Verified(tokens, accepted, leaf)


class Counts(NamedTuple):
    """What was done for each text: calls of the model, drafts of a branch in them, and those that were accepted."""

    calls: Any
    drafts: Any
    accepted: Any

    def __str__(self) -> str:
        rate = 100 * self.accepted / max(self.drafts, 1)
        tokens = (self.calls + self.accepted) / max(self.calls, 1)
        return f"{self.accepted} of {self.drafts} drafts accepted ({rate:.0f} %), {tokens:.2f} tokens a call"


class Progress(NamedTuple):
    """Texts under way.

    Attributes:
        states: of all layers.
        text: (batch, capacity); the newest token has not been fed to the model.
        lengths: (batch,).
        drawn: (batch,), how many tokens of them were drawn.
        start, kept: how the next call goes on, as in ``model.Drafts``.
        counts: each () or (batch,).
        cursor: of states that are replayed.
    """

    states: tuple[model.State, ...]
    text: Any
    lengths: Any
    drawn: Any
    start: Any
    kept: Any
    counts: Counts
    cursor: ssu_bridge.ReplayCursor | None = None


def begin(
    config: Mamba2Config,
    weights: model.Weights,
    prompts: Sequence[Sequence[int]],
    keys: jax.Array,
    *,
    capacity: int,
    speculation: Speculation,
    sampling: Sampling,
    state_dtype: str = "float32",
    backend: str | None = None,
) -> Progress:
    """Read prompts and draw the first token of each; sequence i has slot i. A text has room for ``capacity`` tokens."""
    batch, dtype = len(prompts), weights.embedding.dtype.name
    of_a_slot = 1 if speculation.replay else speculation.tokens
    states = model.zero_states(config, batch, dtype, state_dtype, tokens=speculation.tokens, of_a_slot=of_a_slot)
    states, logits = prefill(config, weights, states, prompts, jnp.arange(batch, dtype=jnp.int32), backend)[:2]
    text, lengths = np.zeros((batch, capacity), np.int32), np.array([len(prompt) for prompt in prompts], np.int32)
    for own, prompt in zip(text, prompts, strict=True):
        own[: len(prompt)] = prompt
    begun: Progress = _begun(
        config, weights, states, logits, text, lengths, keys, speculation=speculation, sampling=sampling
    )
    return begun


@functools.partial(jax.jit, static_argnames=("config", "speculation", "sampling"), donate_argnames=("states", "text"))
def _begun(
    config: Mamba2Config,
    weights: model.Weights,
    states: tuple[model.State, ...],
    logits: jax.Array,
    text: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    *,
    speculation: Speculation,
    sampling: Sampling,
) -> Progress:
    """Draw the first token of each text from the logits after its prompt."""
    first = _draw(logits[:, None], keys, jnp.zeros((len(lengths), 1), jnp.int32), sampling)[:, 0]
    text = text.at[jnp.arange(len(lengths)), lengths].set(first)
    return under_way(config, weights, states, text, lengths + 1, speculation.tokens, speculation.replay)


def under_way(
    config: Mamba2Config,
    weights: model.Weights,
    states: tuple[model.State, ...],
    text: jax.Array,
    lengths: jax.Array,
    tokens: int,
    replay: int | None = None,
) -> Progress:
    """Return the Progress of texts whose newest token is the first that was drawn, for calls of up to so many tokens.

    With ``replay`` states are written once in a window of tokens.
    """
    zeros, ones = (jnp.full(lengths.shape, number, jnp.int32) for number in (0, 1))
    kept = convolution.after_rejected(states[0].conv.shape[1], zeros)
    cursor = None
    if replay is not None:
        states, cursor = model.with_replay(config, weights, states, replay, tokens)
    counts = Counts(*(jnp.copy(zeros) for _ in Counts._fields))
    return Progress(states, text, lengths, ones, jnp.copy(ones), kept, counts, cursor)


@functools.partial(
    jax.jit, static_argnames=("config", "speculation", "sampling", "backend"), donate_argnames="progress"
)
def speculate(
    config: Mamba2Config,
    weights: model.Weights,
    progress: Progress,
    keys: jax.Array,
    *,
    until: int | jax.Array,
    speculation: Speculation,
    sampling: Sampling,
    backend: str | None = None,
) -> Progress:
    """Decode until so many tokens of each text are drawn or some more; fewer where a text is about to be full.

    All of it is on the device: a ``lax.while_loop`` of verifications, and of single tokens while there is nothing to
    look up for any of the texts. The states are donated, and updated where they lie.
    """
    room = progress.text.shape[1] - speculation.tokens
    take = functools.partial(step, config, weights, keys, sampling, backend)

    def look(progress: Progress) -> tuple[Progress, Found]:
        return progress, look_up(progress.text, progress.lengths, speculation)

    def wants_more(carry: tuple[Progress, Found]) -> jax.Array:
        return jnp.any(carry[0].drawn < until) & jnp.all(carry[0].lengths <= room)

    def size(carry: tuple[Progress, Found]) -> jax.Array:
        return jnp.sum(jnp.max(carry[1].matched) >= jnp.array(list(speculation.sizes))) - 1

    def wants(number: int, carry: tuple[Progress, Found]) -> jax.Array:
        return wants_more(carry) & (size(carry) == number)

    def more(depth: int, carry: tuple[Progress, Found]) -> tuple[Progress, Found]:
        return look(take(carry[0], carry[1].drafts[:, :, :depth]))

    def some(carry: tuple[Progress, Found]) -> tuple[Progress, Found]:
        # Loops, where a lax.switch would copy the states.
        for number, depth in enumerate(speculation.sizes.values()):
            carry = jax.lax.while_loop(functools.partial(wants, number), functools.partial(more, depth), carry)
        return carry

    return jax.lax.while_loop(wants_more, some, look(progress))[0]


def step(
    config: Mamba2Config,
    weights: model.Weights,
    keys: jax.Array,
    sampling: Sampling,
    backend: str | None,
    progress: Progress,
    drafts: jax.Array,
) -> Progress:
    """Feed the newest token of each text, and drafts (batch, branches, depth) that may follow it."""
    batch, length = progress.kept.shape
    branches, depth = drafts.shape[1:]
    newest = jnp.take_along_axis(progress.text, progress.lengths[:, None] - 1, axis=1)
    fed = jnp.concatenate([newest, drafts.reshape(batch, -1)], axis=1)
    depths = tree_depths(branches, depth)
    tree = jnp.broadcast_to(tree_parents(branches, depth), fed.shape) if branches > 1 and depth else None
    slots = jnp.arange(batch, dtype=jnp.int32)
    how = model.Drafts(progress.start, progress.kept, tree)
    x, states, _ = model.forward(
        config, weights, progress.states, fed, slots, drafts=how, backend=backend, cursor=progress.cursor
    )
    drawn = _draw(model.logits(config, weights, x), keys, progress.drawn[:, None] + depths, sampling)
    verified = verify(drafts, drawn)
    if tree is None:
        kept = convolution.after_rejected(length, fed.shape[1] - 1 - verified.accepted)
    else:
        kept = convolution.after_path(length, config.conv_kernel, tree, verified.leaf)
    places = progress.lengths[:, None] + jnp.arange(verified.tokens.shape[1])
    more, done, cursor = verified.accepted + 1, (1, depth, verified.accepted), progress.cursor
    if cursor is not None:
        cursor = ssu_bridge.advance_replay(cursor, slots, tokens=fed.shape[1], num_accepted=more)
    return Progress(
        states,
        progress.text.at[slots[:, None], places].set(verified.tokens, mode="drop"),
        progress.lengths + more,
        progress.drawn + more,
        verified.leaf + 1,
        kept,
        Counts(*(n + new for n, new in zip(progress.counts, done, strict=True))),
        cursor,
    )


def _draw(logits: jax.Array, keys: jax.Array, drawn: jax.Array, sampling: Sampling) -> jax.Array:
    """Draw a token of each (batch, tokens), as it would be drawn after so many others."""
    own = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, drawn)
    return sample(logits.reshape(-1, logits.shape[-1]), own.reshape(-1), sampling).reshape(drawn.shape)


def stream(
    config: Mamba2Config,
    weights: model.Weights,
    prompt: list[int],
    count: int,
    *,
    speculation: Speculation,
    sampling: Sampling = DEFAULT,
    seed: int = 0,
    state_dtype: str = "float32",
    report: Callable[[Counts], None] = lambda counts: None,
) -> Iterator[int]:
    """Do what ``generate.stream`` does; at the end of the text, ``report`` is called with what was done.

    Raises:
        ValueError: an argument is wrong; at once.
    """
    check_request(config, prompt, count, seed)
    return _stream(config, weights, prompt, count, speculation, sampling, seed, state_dtype, report)


def _stream(
    config: Mamba2Config,
    weights: model.Weights,
    prompt: list[int],
    count: int,
    speculation: Speculation,
    sampling: Sampling,
    seed: int,
    state_dtype: str,
    report: Callable[[Counts], None],
) -> Iterator[int]:
    keys = jax.random.key(np.uint32(seed))[None]
    how: dict[str, Any] = {"speculation": speculation, "sampling": sampling}
    capacity = bucket(len(prompt) + count + 2 * speculation.tokens)
    progress = begin(config, weights, [prompt], keys, capacity=capacity, state_dtype=state_dtype, **how)

    counts = progress.counts

    def pieces() -> Iterator[tuple[jax.Array, jax.Array, Counts]]:
        nonlocal progress
        # About as many calls of the model as single tokens in a piece.
        for so_far in range(0, count, 2 * PIECE):
            until = np.int32(min(so_far + 2 * PIECE, count))
            progress = speculate(config, weights, progress, keys, until=until, **how)
            # Copies: the next piece takes over what it is given.
            yield jax.tree.map(jnp.copy, (progress.text, progress.lengths, progress.counts))

    def drawn() -> Iterator[int]:
        nonlocal counts
        read, end = len(prompt), len(prompt) + count
        for piece in map(jax.device_get, one_ahead(pieces())):
            text, lengths, counts = piece
            now = min(int(lengths[0]), end)
            yield from text[0, read:now].tolist()
            read = now

    for token in drawn():
        yield token
        if token in config.eos_token_ids:
            break
    report(Counts(*(int(number[0]) for number in jax.device_get(counts))))
