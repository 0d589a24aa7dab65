"""The steps of the scheduler on the device: what is compiled once for a width and a budget of rows."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import ssu_bridge
from mamba2_jax import convolution, model
from mamba2_jax.config import Mamba2Config
from mamba2_jax.sampling import Sampling, sample

DRAW = -1


class Carry(NamedTuple):
    """What a step leaves to the next one: all states, those on the way through prompts, and what each place draws from.

    The latter are the logits (width, vocab_size) and how many tokens each place has drawn; steps with drafts use
    neither. ``cursor`` is that of states which are replayed.
    """

    states: tuple[model.State, ...]
    snapshots: tuple[model.State, ...]
    logits: jax.Array
    drawn: jax.Array
    cursor: ssu_bridge.ReplayCursor | None = None


class Step(NamedTuple):
    """A step of packed rows: its tokens, of which DRAW stands for one to draw, and what belongs to each place."""

    fed: Any
    edges: Any
    slots: Any
    has_initial_state: Any
    entries: Any
    seeds: Any


@functools.partial(jax.jit, donate_argnums=0)
def restore(carry: Carry, slot: jax.Array, entry: jax.Array, step: jax.Array) -> Carry:
    """Put a kept state into a slot."""

    def put(state: jax.Array, kept: jax.Array) -> jax.Array:
        of_a_slot = len(state) // len(carry.states[0].conv)
        return state.at[slot * of_a_slot].set(kept[entry, step])

    if carry.cursor is None:
        return carry._replace(states=jax.tree.map(put, carry.states, carry.snapshots))
    states = tuple(
        model.State(
            put(state.conv, kept.conv), state.ssm._replace(checkpoint=jax.tree.map(put, state.ssm.checkpoint, kept.ssm))
        )
        for state, kept in zip(carry.states, carry.snapshots, strict=True)
    )
    return carry._replace(states=states, cursor=ssu_bridge.reset_replay(carry.cursor, slot[None]))


@functools.partial(jax.jit, static_argnames=("config", "sampling", "stride"), donate_argnames="carry")
def mixed(
    config: Mamba2Config, weights: model.Weights, carry: Carry, call: Step, sampling: Sampling, stride: int
) -> tuple[jax.Array, Carry]:
    """Take a step of packed rows; return the token that each place would draw, (width,)."""
    rows = convolution.Rows(call.edges)
    draws = call.fed == DRAW
    drawn = _drawn(carry, call.seeds, sampling)
    tokens = jnp.where(draws, drawn[rows.sequences(len(call.fed))], call.fed)
    snapshots = model.Snapshots(carry.snapshots, call.entries, stride) if stride else None
    x, states, kept = model.forward(
        config,
        weights,
        carry.states,
        tokens,
        call.slots,
        rows=rows,
        has_initial_state=call.has_initial_state,
        snapshots=snapshots,
    )
    last = jnp.maximum(call.edges[1:] - 1, 0)
    has_rows = rows.lengths > 0
    logits = jnp.where(has_rows[:, None], model.logits(config, weights, x[last]), carry.logits)
    count = jnp.where(has_rows & draws[last], carry.drawn + 1, 0)
    return drawn, Carry(states, carry.snapshots if kept is None else kept, logits, count)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "piece"), donate_argnames="carry")
def several(
    config: Mamba2Config,
    weights: model.Weights,
    carry: Carry,
    slots: jax.Array,
    seeds: jax.Array,
    sampling: Sampling,
    piece: int,
) -> tuple[jax.Array, Carry]:
    """Decode a piece of each sequence: (piece, width)."""

    def token(carry: Carry, _: None) -> tuple[Carry, jax.Array]:
        tokens = _drawn(carry, seeds, sampling)
        logits, states = model.step(config, weights, carry.states, tokens, slots)
        return Carry(states, carry.snapshots, logits, carry.drawn + 1), tokens

    carry, tokens = jax.lax.scan(token, carry, None, length=piece)
    return tokens, carry


def _drawn(carry: Carry, seeds: jax.Array, sampling: Sampling) -> jax.Array:
    """Draw a token for each place: what it is depends on the sequence's seed, logits and how many it drew before."""
    keys = jax.vmap(jax.random.key)(seeds)
    return sample(carry.logits, jax.vmap(jax.random.fold_in)(keys, carry.drawn), sampling)


@functools.partial(jax.jit, static_argnames=("config", "sampling"), donate_argnames="carry")
def one_row(
    config: Mamba2Config,
    weights: model.Weights,
    carry: Carry,
    fed: jax.Array,
    begins: jax.Array,
    slots: jax.Array,
    seeds: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, Carry]:
    """Take a token of each place for each row of ``fed`` (piece, width), and return them with their draws.

    ``begins`` (width,) says whose first row begins a prompt.
    """

    def token(carry: Carry, call: tuple[jax.Array, jax.Array]) -> tuple[Carry, jax.Array]:
        own, goes_on = call
        draws = own == DRAW
        tokens = jnp.where(draws, _drawn(carry, seeds, sampling), own)
        x, states, _ = model.forward(config, weights, carry.states, tokens, slots, has_initial_state=goes_on)
        count = jnp.where(draws, carry.drawn + 1, 0)
        return Carry(states, carry.snapshots, model.logits(config, weights, x), count), tokens

    goes_on = jnp.ones(fed.shape, jnp.bool_).at[0].set(~begins)
    carry, tokens = jax.lax.scan(token, carry, (fed, goes_on))
    return tokens, carry


class Verification(NamedTuple):
    """A step with drafts: packed rows of the sequences that decode, and then of those whose prompts are read.

    Attributes:
        fed: (rows,) tokens.
        edges: (batch + 1,), of each place that decodes, and where prompts are read of each place that reads.
        slots, has_initial_state, entries: (batch,).
        start, rejected: (width,), of those that decode, the tokens of the last call that were kept and that were not.
        last: (width, tokens), the rows after which to draw.
        seeds: (width,).
        drawn: (width,), how many tokens a place drew before.
    """

    fed: Any
    edges: Any
    slots: Any
    has_initial_state: Any
    entries: Any
    start: Any
    rejected: Any
    last: Any
    seeds: Any
    drawn: Any


@functools.partial(jax.jit, static_argnames=("config", "sampling", "stride"), donate_argnames="carry")
def verified(
    config: Mamba2Config, weights: model.Weights, carry: Carry, call: Verification, sampling: Sampling, stride: int
) -> tuple[jax.Array, jax.Array, Carry]:
    """Take a step with drafts.

    Returns:
        What each place draws after each of its rows, (width, tokens); how many of its drafts, (width,), that confirms;
        and what is carried on.
    """
    width = len(call.start)
    cursor, own_edges = carry.cursor, call.edges[: width + 1]
    if cursor is not None:  # whose prompt begins has a slot that another sequence may have left
        cursor = ssu_bridge.reset_replay(cursor, jnp.where(call.has_initial_state, -1, call.slots))
    kept = convolution.after_rejected(carry.states[0].conv.shape[1], call.rejected)
    x, states, snapshots = model.forward(
        config,
        weights,
        carry.states,
        call.fed,
        call.slots,
        rows=convolution.Rows(call.edges),
        has_initial_state=call.has_initial_state,
        drafts=model.Drafts(call.start, kept),
        snapshots=model.Snapshots(carry.snapshots, call.entries, stride) if stride else None,
        cursor=cursor,
    )
    own = jax.vmap(jax.random.key)(call.seeds)
    numbers = call.drawn[:, None] + jnp.arange(call.last.shape[1])
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(own, numbers).reshape(-1)
    drawn = sample(model.logits(config, weights, x[call.last.reshape(-1)]), keys, sampling).reshape(call.last.shape)
    drafts = call.fed[jnp.minimum(own_edges[:-1, None] + 1 + jnp.arange(call.last.shape[1]), len(call.fed) - 1)]
    is_draft = jnp.arange(call.last.shape[1]) + 1 < (own_edges[1:] - own_edges[:-1])[:, None]
    accepted = jnp.cumprod((drafts == drawn) & is_draft, axis=1).sum(axis=1)
    if cursor is not None:
        lengths = {"cu_seqlens": own_edges, "num_accepted": accepted + 1}
        cursor = ssu_bridge.advance_replay(cursor, call.slots[:width], **lengths)
    kept_states = carry.snapshots if snapshots is None else snapshots
    return drawn, accepted, carry._replace(states=states, snapshots=kept_states, cursor=cursor)
