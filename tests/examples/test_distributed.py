"""The example model on several devices, which share its heads: one sum over them in each layer."""

import dataclasses
import functools
import re
from collections import Counter

import jax
import numpy as np
import pytest
from copied import copied, jax_array
from jax.sharding import AxisType
from sharded import COLLECTIVE
from small_models import random_states, random_weights

from mamba2_jax import distributed, model
from mamba2_jax.config import Mamba2Config
from mamba2_jax.requests import Sequence
from mamba2_jax.sampling import Sampling
from mamba2_jax.scheduler import Scheduler
from mamba2_jax.speculate import Speculation

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 16}
VARIANTS = {
    "one group": Mamba2Config(**SIZES),
    "two groups, biases": Mamba2Config(**SIZES, n_groups=2, use_bias=True),
    "no bias of the convolution": Mamba2Config(**SIZES, use_conv_bias=False),
}


@pytest.fixture
def mesh():
    return jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])


# By default without the one whose arrays are fewer.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * name.startswith("no bias")) for name in VARIANTS]
)
def test_devices_that_share_the_heads(name, mesh):
    config = VARIANTS[name]
    rng = np.random.default_rng(1)
    weights = jax.tree.map(lambda a: copied(a + 0.1 * rng.standard_normal(a.shape, "float32")), random(config))
    states = random_states(config, 3, seed=2)
    tokens, slots = jax_array([5, 9]), np.array([2, 0], np.int32)
    expected = stepped(config)(weights, states, tokens, slots)
    shared = config.over(mesh)
    placed = distributed.place(shared, weights), distributed.place(shared, states), tokens, slots
    compiled = stepped(shared).lower(*placed).compile()
    logits, after = compiled(*placed)
    np.testing.assert_allclose(logits, expected[0], rtol=1e-4, atol=1e-4)
    for state, old, new in zip(after, states, distributed.place(shared, expected[1]), strict=True):
        assert not np.array_equal(new.ssm, old.ssm)
        np.testing.assert_allclose(state.conv, new.conv, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.ssm, new.ssm, rtol=1e-4, atol=1e-5)
    found = Counter(kind for kind, _ in re.findall(COLLECTIVE, compiled.as_text()))
    assert found == {"all-reduce": config.num_hidden_layers}


def stepped(config):
    return jax.jit(functools.partial(model.step, config, backend="cpu"))


def random(config):
    return random_weights(config, jax.random.key(0))


SERVED = {
    "states on the way through prompts": {"prefixes": 4, "prefix_stride": 8},
    "drafts, replayed": {"speculation": Speculation(4, shortest=1, replay=8)},
    "quantised states": {"state_dtype": "int8"},
}


@pytest.mark.parametrize("options", SERVED.values(), ids=SERVED)
def test_texts_of_requests_are_those_of_one_device(options, mesh):
    config = dataclasses.replace(VARIANTS["one group"], num_hidden_layers=1)
    weights, shared = random(config), config.over(mesh)
    expected = texts(config, weights, **options)
    assert texts(shared, distributed.place(shared, weights), **options) == expected


def texts(config, weights, **options):
    """Serve some requests, one of which begins as one before it."""
    batch = Scheduler(config, weights, width=2, rows=32, sampling=Sampling(temperature=0), **options)
    requests = [Sequence(prompt, 12) for prompt in ([1, 2, 3] * 8, [7, 8], [1, 2, 3] * 8 + [9])]
    for request in requests:
        batch.submit(request)
    list(batch.run())
    return [request.drawn for request in requests]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_states_are_replayed_before_they_are_placed_or_after(dtype, mesh):
    config = VARIANTS["one group"]
    weights, shared = random(config), config.over(mesh)
    states = [state._replace(ssm=model.stored(state.ssm, dtype)) for state in random_states(config, 3, seed=2)]
    before, _ = model.with_replay(config, weights, states, 8)
    after, _ = model.with_replay(shared, weights, distributed.place(shared, states), 8)
    for one, other in zip(*map(jax.tree.leaves, (distributed.place(shared, before), after)), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
        np.testing.assert_array_equal(one, other)


def test_heads_that_devices_cannot_share(mesh):
    with pytest.raises(ValueError, match="num_heads: expected a multiple of 2 devices, got 3"):
        Mamba2Config(**{**SIZES, "num_heads": 3}).over(mesh)
    with pytest.raises(ValueError, match="n_groups: expected 1 or a multiple of 2 devices, got 3"):
        Mamba2Config(**{**SIZES, "num_heads": 6}, n_groups=3).over(mesh)
