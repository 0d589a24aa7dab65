"""The model: one token of each sequence through all layers, the states going through ``ssu_bridge.update``.

Sizes are those of :class:`~mamba2_jax.config.Mamba2Config`. Weights have the shapes of their Hugging Face tensors.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

import ssu_bridge
from mamba2_jax.config import Mamba2Config


class Layer(NamedTuple):
    """The weights of one layer; those that a configuration does without are None."""

    norm: jax.Array
    in_proj: jax.Array
    in_proj_bias: jax.Array | None
    conv: jax.Array
    conv_bias: jax.Array | None
    A_log: jax.Array
    D: jax.Array
    dt_bias: jax.Array
    gated_norm: jax.Array
    out_proj: jax.Array
    out_proj_bias: jax.Array | None


class Weights(NamedTuple):
    """All weights; ``head`` is None where the embedding is the head too."""

    embedding: jax.Array
    layers: tuple[Layer, ...]
    norm: jax.Array
    head: jax.Array | None


class State(NamedTuple):
    """What one layer carries from token to token, by slot.

    ``conv`` (slots, conv_kernel - 1, conv_size) has the last inputs of the convolution, ``ssm`` (slots, num_heads,
    head_dim, state_size) the states.
    """

    conv: jax.Array
    ssm: jax.Array


def zero_states(config: Mamba2Config, slots: int, conv_dtype: str, ssm_dtype: str) -> tuple[State, ...]:
    """Return the states of all layers for sequences that have not begun.

    A tuple, for the layers to be unrolled over: a scan over *stacked* layer states would copy them.
    """
    conv = (slots, config.conv_kernel - 1, config.conv_size)
    ssm = (slots, config.num_heads, config.head_dim, config.state_size)
    return tuple(State(jnp.zeros(conv, conv_dtype), jnp.zeros(ssm, ssm_dtype)) for _ in range(config.num_hidden_layers))


def step(
    config: Mamba2Config,
    weights: Weights,
    states: tuple[State, ...],
    tokens: jax.Array,
    slots: jax.Array,
    backend: str | None = None,
) -> tuple[jax.Array, tuple[State, ...]]:
    """Take one token of each sequence.

    Args:
        states: of all layers. Donate them to the enclosing ``jax.jit`` to have them updated in place.
        tokens: (batch,) integers.
        slots: (batch,) int32, where the state of each sequence lies; -1 is a place that stands empty.
        backend: who computes the SSM step; None: as configured while this is traced.

    Returns:
        The logits of the next token, (batch, vocab_size) in float32, and the new states.
    """
    x = embed(config, weights, tokens)
    new_states = []
    for layer, state in zip(weights.layers, states, strict=True):
        x, state = layer_step(config, layer, state, x, slots, backend)
        new_states.append(state)
    return logits(config, weights, x), tuple(new_states)


def layer_step(
    config: Mamba2Config, layer: Layer, state: State, x: jax.Array, slots: jax.Array, backend: str | None
) -> tuple[jax.Array, State]:
    """Take the residual stream of one token of each sequence, (batch, hidden_size), through one layer."""
    z, xBC, dt = project(config, layer, x)
    # A pad goes past the last slot, each to a place of its own, where -1 would wrap around to the last.
    places = jnp.where(slots < 0, state.conv.shape[0] + jnp.arange(len(slots)), slots)
    window = jnp.concatenate(
        [state.conv.at[places].get(mode="fill", fill_value=0, unique_indices=True), xBC[:, None]], axis=1
    )
    heads, B, C = split_heads(config, convolve(layer, window)[:, 0])
    y, ssm = ssu_bridge.update(
        state.ssm,
        heads,
        dt,
        -jnp.exp(layer.A_log),
        B,
        C,
        layer.D,
        dt_bias=layer.dt_bias,
        dt_softplus=True,
        state_batch_indices=slots,
        backend=backend,
    )
    conv = state.conv.at[places].set(window[:, 1:].astype(state.conv.dtype), mode="drop", unique_indices=True)
    return finish(config, layer, x, y, z), State(conv, ssm)


# --- The parts of a layer; they take any number of axes before the last, so that training has them too ---


def embed(config: Mamba2Config, weights: Weights, tokens: jax.Array) -> jax.Array:
    """Return the residual stream that the first layer reads."""
    x = weights.embedding[tokens]
    return x.astype(jnp.float32) if config.residual_in_fp32 else x


def project(config: Mamba2Config, layer: Layer, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return z (..., inner_size), the convolution's input (..., conv_size) and dt (..., num_heads)."""
    normed = rms_norm(x, layer.norm, config.layer_norm_epsilon)
    projected = linear(normed, layer.in_proj, layer.in_proj_bias)
    z, xBC, dt = jnp.split(projected, [config.inner_size, config.inner_size + config.conv_size], axis=-1)
    return z, xBC, dt


def convolve(layer: Layer, window: jax.Array) -> jax.Array:
    """Convolve each channel with its own kernel, and apply SiLU.

    ``window`` (batch, conv_kernel - 1 + length, conv_size) begins with what came before; the result has its length.
    """
    width = layer.conv.shape[-1]
    length = window.shape[1] - width + 1
    result = sum(window[:, i : i + length] * layer.conv[None, None, :, 0, i] for i in range(width))
    return jax.nn.silu(result if layer.conv_bias is None else result + layer.conv_bias[None, None])


def split_heads(config: Mamba2Config, xBC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return x (..., num_heads, head_dim), B and C (..., n_groups, state_size)."""
    shared = config.n_groups * config.state_size
    x, B, C = jnp.split(xBC, [config.inner_size, config.inner_size + shared], axis=-1)
    batch = xBC.shape[:-1]
    groups = (*batch, config.n_groups, config.state_size)
    return x.reshape(*batch, config.num_heads, config.head_dim), B.reshape(groups), C.reshape(groups)


def finish(config: Mamba2Config, layer: Layer, x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """Gate the step's output (..., num_heads, head_dim), project it and add it to the residual stream."""
    gated = y.reshape(z.shape).astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
    by_group = gated.reshape(*z.shape[:-1], config.n_groups, -1)
    weight = layer.gated_norm.reshape(config.n_groups, -1)
    normed = rms_norm(by_group, weight, config.layer_norm_epsilon).reshape(z.shape)
    return x + linear(normed, layer.out_proj, layer.out_proj_bias).astype(x.dtype)


def logits(config: Mamba2Config, weights: Weights, x: jax.Array) -> jax.Array:
    """Return the scores of the next token, (..., vocab_size) in float32."""
    head = weights.embedding if weights.head is None else weights.head
    return linear(rms_norm(x, weights.norm, config.layer_norm_epsilon), head, None).astype(jnp.float32)


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    """Scale x to a mean square of one along its last axis, in float32; the result has the weight's dtype."""
    x = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return (x * scale).astype(weight.dtype) * over(x, weight)


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Multiply the last axis by a weight of (out, in) and add the bias."""
    product = x @ weight.T
    return product if bias is None else product + over(product, bias)


def over(x: jax.Array, parameter: jax.Array) -> jax.Array:
    """Give a parameter the leading axes that x has beyond its own, of size 1."""
    return parameter.reshape(*[1] * (x.ndim - parameter.ndim), *parameter.shape)
