"""Training the example model: the window's logits are the step's, the loss falls, and what is saved can be loaded."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from small_models import random_weights, zero_states

from mamba2_jax import checkpoint, model, train
from mamba2_jax.config import Mamba2Config

TINY = Mamba2Config(256, 32, 2, num_heads=4, head_dim=16, state_size=8, n_groups=2, use_bias=True)


def test_a_window_has_the_logits_and_states_of_its_steps():
    weights = random_weights(TINY, jax.random.key(0))
    zeros = zero_states(TINY, 3, "float32", "float32")
    states = jax.tree.map(lambda s: s + jnp.linspace(-1, 1, s.size).reshape(s.shape), zeros)
    tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, 256)
    logits, after = jax.jit(train.window_logits, static_argnums=0)(TINY, weights, states, tokens)
    step = jax.jit(model.step, static_argnums=0)
    for i in range(9):
        expected, states = step(TINY, weights, states, tokens[:, i], jnp.arange(3))
        np.testing.assert_allclose(logits[:, i], expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(states), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_that_of_differences():
    weights = random_weights(TINY, jax.random.key(0))
    states = zero_states(TINY, 2, "float32", "float32")
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 256)
    direction = random_weights(TINY, jax.random.key(2))

    @jax.jit
    def loss(weights):
        logits, _ = train.window_logits(TINY, weights, states, tokens[:, :-1])
        return train.cross_entropy(logits, tokens[:, 1:])

    # In NumPy: JAX compiles each operation for each shape.
    weights, direction = (jax.tree.map(np.array, tree) for tree in (weights, direction))

    def moved(by):
        return loss(jax.tree.map(lambda w, d: w + np.float32(by) * d, weights, direction))

    slopes = jax.tree.map(lambda g, d: np.vdot(g, d), jax.grad(loss)(weights), direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(slopes)), (moved(1e-2) - moved(-1e-2)) / 2e-2, rtol=2e-2)


# The same for all trainings, which then are one program.
TEXT = b"the quick brown fox jumps over the lazy dog. " * 200
SIZES = ["--hidden-size", "32", "--layers", "1", "--head-dim", "16", "--state-size", "8"]
SIZES += ["--batch", "8", "--length", "32", "--learning-rate", "1e-2"]


def test_training_learns_and_saves(tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_bytes(TEXT)
    steps = ["--steps", "60"]
    monkeypatch.setattr(sys, "argv", ["train", str(tmp_path / "text"), str(tmp_path / "model"), *SIZES, *steps])
    train.main()
    assert "held-out text" in capsys.readouterr().out
    config, weights = checkpoint.load(tmp_path / "model")
    bits = train.bits_per_byte(config, weights, np.frombuffer(TEXT, np.uint8)[:1600])
    assert bits < 0.7 * math.log2(len(set(TEXT)))  # what knowing no more than the letters would take


def test_time_ends_a_training(tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_bytes(TEXT)
    limits = ["--steps", "1000000", "--minutes", "0.01"]
    monkeypatch.setattr(sys, "argv", ["train", str(tmp_path / "text"), str(tmp_path / "model"), *SIZES, *limits])
    train.main()
    assert (tmp_path / "model" / "model.safetensors").exists()
