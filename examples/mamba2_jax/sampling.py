"""Choosing the next token from its logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp

# Logits divided by less could overflow; the likeliest token is the only one by then, but for those that are as likely.
_LEAST_TEMPERATURE = 1e-5


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits. 0 takes the likeliest token, and so does what is smaller than 1e-5.
        top_p: keeps the likeliest tokens, up to the first at which their probabilities add up to it; 0 keeps one.

    Raises:
        ValueError: one of them is no such number; the message names it.
    """

    temperature: float = 0.8
    top_p: float = 0.95

    def __post_init__(self) -> None:
        for name, most in (("temperature", math.inf), ("top_p", 1)):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 <= value <= most
                or value == math.inf
            ):
                wanted = "a number of 0 or more" if most == math.inf else "a number from 0 to 1"
                raise ValueError(f"{name}: expected {wanted}, got {value!r}")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken always."""
        return self.temperature < _LEAST_TEMPERATURE or self.top_p == 0


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
    if sampling.is_greedy:
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
