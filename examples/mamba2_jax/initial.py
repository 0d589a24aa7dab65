"""Random weights, as a model has them before it is trained."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mamba2_jax.checkpoint import template
from mamba2_jax.config import Mamba2Config
from mamba2_jax.model import Weights


def random_weights(config: Mamba2Config, key: jax.Array, dtype: str = "float32") -> Weights:
    """Draw weights as Mamba-2 is initialised: dt from 0.001 to 0.1, A from -16 to -1, matrices by their width."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(template(config, dtype))
    keys = jax.random.split(key, len(leaves))
    drawn = [
        _RULES.get(path[-1].name, _matrix)(own, leaf.shape).astype(leaf.dtype)
        for own, (path, leaf) in zip(keys, leaves, strict=True)
    ]
    weights: Weights = jax.tree.unflatten(tree, drawn)
    # All layers add to one residual stream.
    scale = config.num_hidden_layers**-0.5
    layers = tuple(layer._replace(out_proj=layer.out_proj * scale) for layer in weights.layers)
    return weights._replace(layers=layers)


def _matrix(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape) / math.sqrt(shape[-1])


def _ones(_: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.ones(shape)


def _zeros(_: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape)


def _A_log(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.log(jax.random.uniform(key, shape, minval=1, maxval=16))


def _dt_bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Softplus turns it into dt, drawn evenly on a logarithmic scale."""
    dt = jnp.exp(jax.random.uniform(key, shape, minval=jnp.log(0.001), maxval=jnp.log(0.1)))
    return dt + jnp.log(-jnp.expm1(-dt))


_RULES: dict[str, Callable[[Any, tuple[int, ...]], jax.Array]] = {
    "norm": _ones,
    "gated_norm": _ones,
    "D": _ones,
    "in_proj_bias": _zeros,
    "conv_bias": _zeros,
    "out_proj_bias": _zeros,
    "A_log": _A_log,
    "dt_bias": _dt_bias,
}
