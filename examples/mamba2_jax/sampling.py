"""Choosing the next token from its logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How tokens are drawn.

    ``temperature`` divides the logits; 0 takes the likeliest token. ``top_p`` keeps the likeliest tokens, up to the
    first at which their probabilities add up to it.
    """

    temperature: float = 0.8
    top_p: float = 0.95


DEFAULT = Sampling()


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Draw a token for each sequence.

    Args:
        logits: (batch, vocab_size).
        keys: (batch,) of ``jax.random.key``; a sequence's draw depends on its own key and logits alone.
        sampling: Python numbers, known while tracing.

    Returns:
        (batch,) int32.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits / sampling.temperature
    if sampling.top_p < 1:
        scaled = _nucleus(scaled, sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)


def _nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """Rule out the tokens ahead of which the probabilities of likelier ones already add up to top_p."""
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    ahead = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(ahead < top_p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
