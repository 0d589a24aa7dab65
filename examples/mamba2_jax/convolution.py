"""The causal convolution of a layer, and the cache of its last inputs, by slot.

A cache (slots, length, channels) holds the last inputs of each sequence, the newest last; its length is at least the
kernel's width less 1. It may be longer by so many inputs as can be taken back: after drafts are rejected, the next call
says how many in ``rejected``, and goes on from before them.
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
        """Return which sequence each of so many rows belongs to; the last one for rows behind all sequences."""
        found = jnp.searchsorted(self.cu_seqlens[1:], jnp.arange(count), side="right")
        return jnp.minimum(found, len(self.cu_seqlens) - 2)


def histories(
    cache: jax.Array,
    slots: jax.Array,
    *,
    has_initial_state: jax.Array | None = None,
    rejected: jax.Array | None = None,
) -> jax.Array:
    """Return the last inputs of each sequence, (batch, length, channels); zeros for those that begin here.

    Args:
        cache: as above.
        slots: (batch,), where each sequence's inputs lie; negative for none.
        has_initial_state: (batch,) bool; False for a sequence that begins here, whatever its slot holds.
        rejected: (batch,), how many of the newest inputs were drafts that are taken back.
    """
    length = cache.shape[1]
    begins = slots < 0 if has_initial_state is None else (slots < 0) | ~has_initial_state
    # A slot that does not exist reads as zeros, where -1 would wrap around to the last.
    places = jnp.where(begins, cache.shape[0], slots)
    if rejected is None:
        return cache.at[places].get(mode="fill", fill_value=0)
    inputs = jnp.arange(length)[None] - rejected[:, None]
    known = jnp.where(inputs < 0, length, inputs)
    return cache.at[places[:, None], known].get(mode="fill", fill_value=0)


def convolve(history: jax.Array, x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Convolve the inputs (batch, tokens, channels) of sequences with what came before, and apply SiLU.

    Each channel has its own kernel, in ``weight`` (channels, 1, width); ``bias`` is (channels,).
    """
    width, tokens = weight.shape[-1], x.shape[1]
    window = jnp.concatenate([history[:, history.shape[1] - width + 1 :], x], axis=1)
    taps = (window[:, i : i + tokens] * weight[None, None, :, 0, i] for i in range(width))
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
