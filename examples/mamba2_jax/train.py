"""Train a byte-level Mamba-2 model on a text, with the gradient of the step through the xla backend.

Each of ``--batch`` streams reads its own part of the text in windows of ``--length`` bytes, and carries its states from
window to window; now and then a stream begins anew from zeros, as a prompt does. Inside a layer all is computed for the
whole window at once; the xla backend computes the SSM steps of a window in chunks. Training ends after ``--steps`` or
``--minutes``, whichever is first, and the learning rate follows the share that is done.

    python -m mamba2_jax.train kjv.txt mamba2_jax/kjv
"""

import argparse
import functools
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from command_line import mistakes_in_one_line, positive, positive_number
from mamba2_jax import checkpoint, model
from mamba2_jax.config import Mamba2Config
from mamba2_jax.initial import random_weights

_WARM_UP = 0.03  # share of the training in which the learning rate rises
_BETAS, _EPSILON, _WEIGHT_DECAY, _LARGEST_GRADIENT = (0.9, 0.98), 1e-8, 0.1, 1.0
_FRESH_STREAMS = 0.1  # share of the streams that begin anew at a window
_HELD_OUT = 0.02  # share of the text, its end, that is not trained on


class Training(NamedTuple):
    """What changes from window to window: weights, AdamW's two moments, the states of all streams."""

    weights: model.Weights
    mean: model.Weights
    square: model.Weights
    states: tuple[model.State, ...]


def main() -> None:
    """Run the command."""
    parser = _parser()
    arguments = parser.parse_args()
    with mistakes_in_one_line(parser):
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Train and write a checkpoint in the Hugging Face layout."""
    config = Mamba2Config(
        vocab_size=256,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_heads=2 * arguments.hidden_size // arguments.head_dim,
        head_dim=arguments.head_dim,
        state_size=arguments.state_size,
    )
    try:
        config.expand  # noqa: B018  (else saving would fail, after the training)
    except ValueError as error:
        raise ValueError(f"--hidden-size, --head-dim: {error}") from None
    text = np.frombuffer(Path(arguments.text).read_bytes(), np.uint8)
    arguments.folder.mkdir(parents=True, exist_ok=True)  # the same
    text, held_out = np.split(text, [round(len(text) * (1 - _HELD_OUT))])
    weights = train(config, text, arguments)
    checkpoint.save(arguments.folder, config, weights, "bfloat16")
    config, weights = checkpoint.load(arguments.folder)  # as it will be used
    size = (arguments.folder / "model.safetensors").stat().st_size
    print(f"{size / 1e6:.2f} MB; held-out text: {bits_per_byte(config, weights, held_out):.3f} bits a byte")


def train(config: Mamba2Config, text: np.ndarray, arguments: argparse.Namespace) -> model.Weights:
    """Train on a text of bytes and return the weights."""
    key = jax.random.key(arguments.seed)
    weights = random_weights(config, key)
    zeros = jax.tree.map(jnp.zeros_like, weights)
    states = model.zero_states(config, arguments.batch, "float32", "float32")
    training = Training(weights, zeros, jax.tree.map(jnp.copy, zeros), states)
    count = sum(leaf.size for leaf in jax.tree.leaves(weights))
    print(f"{count:,} weights, {len(text):,} bytes of text on {jax.devices()[0]}")

    streams = jnp.asarray(text[: len(text) // arguments.batch * arguments.batch].reshape(arguments.batch, -1))
    windows = (streams.shape[1] - 1) // arguments.length
    if windows < 1:
        raise ValueError(f"the text is too short for {arguments.batch} streams of {arguments.length} bytes and more")
    started, losses = time.perf_counter(), []
    for i in range(arguments.steps):
        elapsed = time.perf_counter() - started
        done = max(i / arguments.steps, elapsed / (60 * arguments.minutes))
        if done >= 1:
            break
        start = i % windows * arguments.length
        step = jnp.array([i, done, start], jnp.float32), jax.random.fold_in(key, i)
        training, loss = update(config, training, streams, *step, arguments.length, arguments.learning_rate)
        losses.append(float(loss))  # which waits for the step, so that the clock is right
        if i == 0:  # compiling is no part of the training
            started = time.perf_counter()
        if i % 50 == 0:
            recent = float(np.mean(losses[-50:])) / math.log(2)
            read = (i + 1) * arguments.batch * arguments.length
            print(f"{elapsed:6.0f} s  step {i:5}  {read / 1e6:7.2f} MB read  {recent:.3f} bits a byte", flush=True)
    return training.weights


@functools.partial(jax.jit, static_argnames=("config", "length", "peak"), donate_argnames="training")
def update(
    config: Mamba2Config,
    training: Training,
    streams: jax.Array,
    progress: jax.Array,
    key: jax.Array,
    length: int,
    peak: float,
) -> tuple[Training, jax.Array]:
    """Train on the next window of each stream; progress has the step's number, the share done and where it starts."""
    number, done, start = progress
    window = jax.lax.dynamic_slice_in_dim(streams, start.astype(int), length + 1, axis=1)
    keep = jax.random.uniform(key, streams.shape[:1]) >= _FRESH_STREAMS
    states = jax.tree.map(lambda s: jnp.where(keep.reshape(-1, *[1] * (s.ndim - 1)), s, 0), training.states)

    def loss_of(weights: model.Weights) -> tuple[jax.Array, tuple[model.State, ...]]:
        logits, states_after = window_logits(config, weights, states, window[:, :-1])
        return cross_entropy(logits, window[:, 1:]), states_after

    (loss, states), gradient = jax.value_and_grad(loss_of, has_aux=True)(training.weights)
    rate = peak * jnp.minimum(done / _WARM_UP, 0.5 * (1 + jnp.cos(jnp.pi * done)) + 0.01)
    weights, mean, square = adamw(training, gradient, number + 1, rate)
    return Training(weights, mean, square, states), loss


def window_logits(
    config: Mamba2Config, weights: model.Weights, states: tuple[model.State, ...], tokens: jax.Array
) -> tuple[jax.Array, tuple[model.State, ...]]:
    """Compute the logits (batch, length, vocab_size) of a window of tokens (batch, length), sequence i in slot i."""
    slots = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    x, states, _ = model.forward(config, weights, states, tokens, slots, backend="xla")
    return model.logits(config, weights, x), states


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return the mean negative log-likelihood of the tokens, in nats."""
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None].astype(int), axis=-1)
    return -jnp.mean(likelihood)


def adamw(training: Training, gradient: model.Weights, number: jax.Array, rate: jax.Array) -> tuple[Any, Any, Any]:
    """Take a step of AdamW (arXiv:1711.05101) with the gradient's norm clipped; only matrices decay."""
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradient)))
    gradient = jax.tree.map(lambda g: g * jnp.minimum(1, _LARGEST_GRADIENT / norm), gradient)
    mean = jax.tree.map(lambda m, g: _BETAS[0] * m + (1 - _BETAS[0]) * g, training.mean, gradient)
    square = jax.tree.map(lambda s, g: _BETAS[1] * s + (1 - _BETAS[1]) * g * g, training.square, gradient)

    def step(w: jax.Array, m: jax.Array, s: jax.Array) -> jax.Array:
        direction = m / (1 - _BETAS[0] ** number) / (jnp.sqrt(s / (1 - _BETAS[1] ** number)) + _EPSILON)
        return w - rate * (direction + (_WEIGHT_DECAY * w if w.ndim == 2 else 0))

    return jax.tree.map(step, training.weights, mean, square), mean, square


def bits_per_byte(config: Mamba2Config, weights: model.Weights, text: np.ndarray) -> float:
    """Return the cross-entropy of a text that is cut into 16 sequences, each beginning from zeros."""
    tokens = jnp.asarray(text[: len(text) // 16 * 16].reshape(16, -1))
    states = model.zero_states(config, 16, "float32", "float32")
    logits = jax.jit(functools.partial(window_logits, config))(weights, states, tokens[:, :-1])[0]
    return float(cross_entropy(logits, tokens[:, 1:])) / math.log(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="the file to train on")
    parser.add_argument("folder", type=Path, help="where the checkpoint goes")
    parser.add_argument("--steps", type=positive, default=2000, help="at most so many windows of each stream")
    parser.add_argument("--minutes", type=positive_number, default=60.0, help="at most so long")
    parser.add_argument("--batch", type=positive, default=64, help="streams")
    parser.add_argument("--length", type=positive, default=256, help="bytes of a window")
    parser.add_argument("--learning-rate", type=positive_number, default=3e-3, help="at its peak")
    parser.add_argument("--hidden-size", type=positive, default=192)
    parser.add_argument("--layers", type=positive, default=7)
    parser.add_argument("--head-dim", type=positive, default=32)
    parser.add_argument("--state-size", type=positive, default=64)
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
