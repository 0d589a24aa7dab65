"""The example model on several devices: heads and weights shared, and only sums exchanged."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from sharded import COLLECTIVE

from mamba2_jax import distributed, model
from mamba2_jax.config import Mamba2Config
from mamba2_jax.initial import random_weights

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 16}
VARIANTS = {
    "one group": Mamba2Config(**SIZES),
    "two groups, biases": Mamba2Config(**SIZES, n_groups=2, use_bias=True),
    "no bias of the convolution": Mamba2Config(**SIZES, use_conv_bias=False),
}
# Of the mean squares of a layer's outputs, if a norm goes over the heads of several devices, and of what leaves it.
SUMS = {"one group": 2, "two groups, biases": 1, "no bias of the convolution": 2}


@pytest.mark.parametrize("name", VARIANTS)
def test_devices_that_share_the_heads(name):
    config = VARIANTS[name]
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    weights = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(1), a.shape), random(config))
    states = random_states(config)
    tokens, slots = jnp.array([5, 9]), np.array([2, 0], np.int32)
    step = jax.jit(functools.partial(model.step, config, backend="cpu"))
    expected = step(weights, states, tokens, slots)
    placed = distributed.place(weights, mesh), distributed.place(states, mesh), tokens, slots
    compiled = step.lower(*placed).compile()
    logits, after = compiled(*placed)
    np.testing.assert_allclose(logits, expected[0], rtol=1e-4, atol=1e-4)
    for state, old, new in zip(after, states, expected[1], strict=True):
        conv = np.concatenate(state.conv, axis=2)
        assert not np.array_equal(new.conv, old.conv)
        np.testing.assert_allclose(conv, new.conv, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.ssm, new.ssm, rtol=1e-4, atol=1e-5)
    found = Counter(kind for kind, _ in re.findall(COLLECTIVE, compiled.as_text()))
    assert found == {"all-reduce": SUMS[name] * config.num_hidden_layers}


def random(config):
    return random_weights(config, jax.random.key(0))


def random_states(config):
    leaves, tree = jax.tree.flatten(model.zero_states(config, 3, "float32", "float32"))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(tree, [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])
