"""The causal convolution of a layer, and the cache of its last inputs, by slot.

A cache (slots, length, channels) holds the last inputs of each sequence, the newest last; its length is at least the
kernel's width less 1. It may be longer by so many inputs as can be taken back: after drafts are rejected, the next call
goes on from those that are ``kept``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rows(NamedTuple):
    """How packed rows belong to sequences.

    ``cu_seqlens`` (batch + 1,): sequence i has the rows from its entry i to before entry i + 1.
    """

    cu_seqlens: jax.Array

    @property
    def starts(self) -> jax.Array:
        """The first row of each sequence."""
        return self.cu_seqlens[:-1]

    @property
    def lengths(self) -> jax.Array:
        """How many rows each has."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    def sequences(self, count: int) -> jax.Array:
        """Return which sequence each of so many rows belongs to; the last one for rows after all sequences."""
        found = jnp.searchsorted(self.cu_seqlens[1:], jnp.arange(count), side="right")
        return jnp.minimum(found, len(self.cu_seqlens) - 2)


def histories(
    cache: jax.Array,
    slots: jax.Array,
    *,
    has_initial_state: jax.Array | None = None,
    kept: jax.Array | None = None,
) -> jax.Array:
    """Return the last inputs of each sequence, (batch, length, channels); zeros for those that begin here.

    Args:
        cache: as above.
        slots: (batch,), where each sequence's inputs lie; negative for none.
        has_initial_state: (batch,) bool; False for a sequence that begins here, whatever its slot holds.
        kept: (first, length), for as many sequences, the first ones: which of their inputs in the cache stay, the
            newest last, and negative for none. See ``after_rejected`` and ``after_path``.
    """
    length = cache.shape[1]
    begins = slots < 0 if has_initial_state is None else (slots < 0) | ~has_initial_state
    # A slot that does not exist reads as zeros, where -1 would wrap around to the last.
    places = jnp.where(begins, cache.shape[0], slots)
    if kept is None:
        return cache.at[places].get(mode="fill", fill_value=0)
    all_of_them = jnp.broadcast_to(jnp.arange(length), (len(slots) - len(kept), length))
    inputs = jnp.concatenate([jnp.where(kept < 0, length, kept), all_of_them])
    return cache.at[places[:, None], inputs].get(mode="fill", fill_value=0)


def after_rejected(length: int, rejected: jax.Array) -> jax.Array:
    """Return which of the last inputs are kept where the newest (batch,) so many were drafts that are taken back."""
    return jnp.arange(length) - rejected[:, None]


def after_path(length: int, width: int, parents: jax.Array, leaf: jax.Array) -> jax.Array:
    """Return which are kept after a tree of drafts: as many as a kernel of that width sees, on the path to a leaf.

    ``parents`` (batch, tokens) are those of the call, ``leaf`` (batch,) the number of the token that it ends with.
    """
    path = [length + leaf[:, None]]
    while len(path) < width - 1:
        path.append(_before(path[-1], parents, length))
    newest = jnp.concatenate(path[::-1], axis=1) - parents.shape[1]
    return jnp.pad(newest, ((0, 0), (length - width + 1, 0)), constant_values=-1)


def _before(places: jax.Array, parents: jax.Array, length: int) -> jax.Array:
    """Return the place before each, where those from ``length`` on are tokens of a tree, and others of its history."""
    token = jnp.maximum(places - length, 0)
    parent = jnp.take_along_axis(parents, token, axis=1)
    parent = jnp.where((parent < 0) | (parent >= token), -1, parent)
    return jnp.where(places < length, places - 1, length + parent)


def convolve(
    history: jax.Array, x: jax.Array, weight: jax.Array, bias: jax.Array | None, *, parents: jax.Array | None = None
) -> jax.Array:
    """Convolve the inputs (batch, tokens, channels) of sequences with what came before, and apply SiLU.

    Each channel has its own kernel, in ``weight`` (channels, 1, width); ``bias`` is (channels,). With ``parents``
    (batch, tokens) what came before a token is what came before in a tree: see ``update``'s parent_tokens.
    """
    width, tokens = weight.shape[-1], x.shape[1]
    window = jnp.concatenate([history[:, history.shape[1] - width + 1 :], x], axis=1)
    if parents is None:
        inputs = [window[:, i : i + tokens] for i in range(width)]
    else:
        places = [jnp.broadcast_to(width - 1 + jnp.arange(tokens), parents.shape)]
        while len(places) < width:
            places.append(_before(places[-1], parents, width - 1))
        inputs = [jnp.take_along_axis(window, p[..., None], axis=1) for p in reversed(places)]
    taps = (own * weight[None, None, :, 0, i] for i, own in enumerate(inputs))
    return _activated(sum(taps, start=jnp.zeros((), x.dtype)), bias)


def convolve_packed(
    history: jax.Array, x: jax.Array, rows: Rows, weight: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """Do the same for packed rows (rows, channels); a row of no sequence has arbitrary numbers."""
    width, before = weight.shape[-1], history.shape[1]
    row = jnp.arange(x.shape[0])
    sequence = rows.sequences(x.shape[0])
    token = row - rows.starts[sequence]

    def tap(back: int) -> jax.Array:
        """Return the input so many tokens before each row's."""
        earlier = history[sequence, jnp.clip(before + token - back, 0, before - 1)]
        inputs = jnp.where((token >= back)[:, None], x[jnp.maximum(row - back, 0)], earlier) if back else x
        return inputs * weight[None, :, 0, width - 1 - back]

    return _activated(sum((tap(back) for back in reversed(range(width))), start=jnp.zeros((), x.dtype)), bias)


def last_inputs(history: jax.Array, x: jax.Array, rows: Rows, ends: jax.Array) -> jax.Array:
    """Return the inputs before some token of each packed sequence, as many as the history has.

    Args:
        history: (batch, length, channels), the inputs before the call.
        x: (rows, channels), those of the call.
        rows: the sequences of the rows.
        ends: (batch, ...), the number of the token, counted from the sequence's first in the call.
    """
    length = history.shape[1]
    batch = (len(ends), *[1] * ends.ndim)
    token = ends[..., None] - length + jnp.arange(length).reshape(*batch[1:], length)
    sequence = jnp.arange(len(ends)).reshape(batch)
    earlier = history[sequence, jnp.clip(length + token, 0, length - 1)]
    own = x[jnp.clip(rows.starts.reshape(batch) + token, 0, x.shape[0] - 1)]
    return jnp.where((token >= 0)[..., None], own, earlier)


def stored(cache: jax.Array, slots: jax.Array, inputs: jax.Array) -> jax.Array:
    """Return a cache with the last inputs (batch, length, channels) of sequences; a negative slot stores nothing."""
    # Each to a place of its own, because XLA writes faster where no two rows go to one place.
    places = jnp.where(slots < 0, cache.shape[0] + jnp.arange(len(slots)), slots)
    return cache.at[places].set(inputs.astype(cache.dtype), mode="drop", unique_indices=True)


def _activated(result: jax.Array, bias: jax.Array | None) -> jax.Array:
    return jax.nn.silu(result if bias is None else result + bias.reshape(*[1] * (result.ndim - 1), -1))
