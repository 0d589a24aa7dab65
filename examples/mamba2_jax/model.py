"""The model: tokens of sequences through all layers, the states going through ``ssu_bridge.update``.

A call has one token of each sequence (``step``), several of each, or packed rows with any number of each (``forward``).

Sizes are those of :class:`~mamba2_jax.config.Mamba2Config`. Weights have the shapes of their Hugging Face tensors.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import ssu_bridge
from mamba2_jax import convolution
from mamba2_jax.config import Mamba2Config
from mamba2_jax.convolution import Rows


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


class Snapshots(NamedTuple):
    """Where the states on the way through prompts are kept: after every ``stride`` tokens of a call's sequences.

    ``states`` of all layers have axes of entries and of steps instead of the one of slots; ``entries`` (batch,) says in
    which a sequence's go, or -1.
    """

    states: tuple[State, ...]
    entries: jax.Array
    stride: int


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
        config, weights: the model.
        states: of all layers. Donate them to the enclosing ``jax.jit`` to have them updated in place.
        tokens: (batch,) integers.
        slots: (batch,) int32, where the state of each sequence lies; -1 is a place that stands empty.
        backend: who computes the SSM step; None: as configured while this is traced.

    Returns:
        The logits of the next token, (batch, vocab_size) in float32, and the new states.
    """
    x, states, _ = forward(config, weights, states, tokens, slots, backend=backend)
    return logits(config, weights, x), states


def forward(
    config: Mamba2Config,
    weights: Weights,
    states: tuple[State, ...],
    tokens: jax.Array,
    slots: jax.Array,
    *,
    rows: Rows | None = None,
    has_initial_state: jax.Array | None = None,
    snapshots: Snapshots | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, tuple[State, ...], tuple[State, ...] | None]:
    """Take tokens through all layers.

    Args:
        config, weights, states, slots, backend: as in :func:`step`.
        tokens: (batch,), (batch, length), or with ``rows`` (rows,).
        rows: the sequences of packed rows.
        has_initial_state: (batch,) bool; False for a sequence that begins here, whatever its slot holds.
        snapshots: for packed rows.

    Returns:
        What the last layer makes of the tokens, for :func:`logits`, with their axes; the new states; and the
        snapshots' states, if there are some.
    """
    x = embed(config, weights, tokens)
    call = _Call(slots, rows, has_initial_state, snapshots, backend)
    new_states, new_snapshots = [], []
    for i, (layer, state) in enumerate(zip(weights.layers, states, strict=True)):
        x, state, kept = _layer(config, layer, state, x, call, snapshots and snapshots.states[i])
        new_states.append(state)
        new_snapshots.append(kept)
    return x, tuple(new_states), tuple(k for k in new_snapshots if k is not None) if snapshots else None


class _Call(NamedTuple):
    """What is the same for all layers."""

    slots: jax.Array
    rows: Rows | None
    has_initial_state: jax.Array | None
    snapshots: Snapshots | None
    backend: str | None


def _layer(
    config: Mamba2Config, layer: Layer, state: State, x: jax.Array, call: _Call, kept: State | None
) -> tuple[jax.Array, State, State | None]:
    """Take the residual stream of the tokens, (..., hidden_size), through one layer."""
    z, xBC, dt = project(config, layer, x)
    convolved, conv, kept_conv = _convolve(layer, state, xBC, call, kept)
    heads, B, C = split_heads(config, convolved)
    dt, dt_options = step_sizes(config, layer, dt)
    y, ssm, *kept_ssm = ssu_bridge.update(
        state.ssm,
        heads,
        dt,
        -jnp.exp(layer.A_log),
        B,
        C,
        layer.D,
        **dt_options,
        state_batch_indices=call.slots,
        has_initial_state=call.has_initial_state,
        cu_seqlens=call.rows and call.rows.cu_seqlens,
        **_snapshot_arguments(call, kept),
        backend=call.backend,
    )
    new = None if kept_conv is None else State(kept_conv, kept_ssm[0])
    return finish(config, layer, x, y, z), State(conv, ssm), new


def _convolve(
    layer: Layer, state: State, xBC: jax.Array, call: _Call, kept: State | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return what the convolution makes of its inputs, its cache after them, and that of the snapshots."""
    history = convolution.histories(state.conv, call.slots, has_initial_state=call.has_initial_state)
    weights = layer.conv, layer.conv_bias
    if call.rows is None:
        inputs = xBC if xBC.ndim == 3 else xBC[:, None]
        convolved = convolution.convolve(history, inputs, *weights).reshape(xBC.shape)
        last = jnp.concatenate([history, inputs], axis=1)[:, inputs.shape[1] :]
        return convolved, convolution.stored(state.conv, call.slots, last), None
    convolved = convolution.convolve_packed(history, xBC, call.rows, *weights)
    lengths = call.rows.lengths
    last = convolution.last_inputs(history, xBC, call.rows, lengths)
    conv = convolution.stored(state.conv, jnp.where(lengths > 0, call.slots, -1), last)
    if kept is None or call.snapshots is None:
        return convolved, conv, None
    ends = jnp.broadcast_to(
        (jnp.arange(kept.conv.shape[1]) + 1) * call.snapshots.stride, (len(lengths), kept.conv.shape[1])
    )
    there = (ends <= lengths[:, None]) & (call.snapshots.entries[:, None] >= 0)
    entries = jnp.where(there, call.snapshots.entries[:, None], kept.conv.shape[0])
    inputs = convolution.last_inputs(history, xBC, call.rows, ends).astype(kept.conv.dtype)
    return convolved, conv, kept.conv.at[entries, jnp.arange(ends.shape[1])[None]].set(inputs, mode="drop")


def _snapshot_arguments(call: _Call, kept: State | None) -> dict[str, Any]:
    if kept is None or call.snapshots is None:
        return {}
    return {
        "intermediate_states": kept.ssm,
        "intermediate_state_indices": call.snapshots.entries,
        "intermediate_stride": call.snapshots.stride,
    }


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


def step_sizes(config: Mamba2Config, layer: Layer, dt: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    """Return dt and the options that make the step's sizes of it, within the model's limits."""
    if config.has_unlimited_steps:
        return dt, {"dt_bias": layer.dt_bias, "dt_softplus": True}
    sizes = jax.nn.softplus(dt.astype(jnp.float32) + over(dt, layer.dt_bias))
    return jnp.clip(sizes, *config.time_step_limit), {}


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
