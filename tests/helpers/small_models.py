"""Weights and states of small models in one program each: eagerly, JAX compiles one for each array and operation."""

import dataclasses

import jax
import numpy as np
from copied import copied

from mamba2_jax import initial, model

random_weights = jax.jit(initial.random_weights, static_argnums=(0, 2))
zero_states = jax.jit(model.zero_states, static_argnums=(0, 1, 2, 3))


def random_states(config, slots, seed):
    """Draw float32 states, by NumPy."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(lambda: zero_states(config, slots, "float32", "float32"))
    return copied(jax.tree.map(lambda one: rng.standard_normal(one.shape).astype("float32"), shapes))


def first_layers(config, weights):
    """Cut a model after two layers, of which everything is compiled sooner. What it writes is no English."""
    return dataclasses.replace(config, num_hidden_layers=2), weights._replace(layers=weights.layers[:2])
