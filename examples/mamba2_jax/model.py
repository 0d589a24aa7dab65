"""The model: tokens of sequences through all layers, the states going through ``ssu_bridge.update``.

A call has one token of each sequence (``step``), several of each, or packed rows with any number of each (``forward``).

Sizes are those of :class:`~mamba2_jax.config.Mamba2Config`. Weights have the shapes of their Hugging Face tensors.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import ssu_bridge
from mamba2_jax import convolution
from mamba2_jax.config import Mamba2Config
from mamba2_jax.convolution import Rows

QUANTIZED = ("int16", "int8", "float8_e4m3fn")


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
    head_dim, state_size) the states: an array, a ``QuantizedState`` or a ``ReplayState``. Where calls of up to T tokens
    are verified, ``conv`` has T - 1 inputs more, and ``ssm`` T states for each slot, one after each token of the last
    such call.
    """

    conv: jax.Array
    ssm: Any


def _along(axis: int) -> Any:
    return PartitionSpec(*[None] * axis, "heads")


# How the arrays of a layer are sharded over devices that share the heads: see ``distributed.place``.
_ON_ALL: Any = PartitionSpec()
LAYER_SPECS = Layer(
    norm=_ON_ALL,
    in_proj=_along(0),
    in_proj_bias=_along(0),
    conv=_along(0),
    conv_bias=_along(0),
    A_log=_along(0),
    D=_along(0),
    dt_bias=_along(0),
    gated_norm=_along(0),
    out_proj=_along(1),
    out_proj_bias=_ON_ALL,
)
STATE_SPECS = State(conv=_along(2), ssm=_along(1))
_SNAPSHOT_SPECS = State(conv=_along(3), ssm=_along(2))


class Snapshots(NamedTuple):
    """Where the states on the way through prompts are kept: after every ``stride`` tokens of a call's sequences.

    ``states`` of all layers have axes of entries and of steps instead of the one of slots; ``entries`` (batch,) says in
    which a sequence's go, or -1.
    """

    states: tuple[State, ...]
    entries: jax.Array
    stride: int


class Drafts(NamedTuple):
    """That the tokens of a call are to be verified: the next one may go on after any of them.

    A State then has room for T tokens; a call has up to so many of each sequence.

    Attributes:
        start: (batch,), the number of tokens up to the one of the last call that this one goes on after; 1 after a
            call without Drafts. States that are replayed do not need it.
        kept: (batch, length), which inputs in the convolution's cache led there: see ``convolution.kept``.
        parents: (batch, tokens), for a tree of drafts: the token of this call that each continues, or -1.
    """

    start: jax.Array
    kept: jax.Array
    parents: jax.Array | None = None


def zero_states(
    config: Mamba2Config, slots: int, conv_dtype: str, ssm_dtype: str, *, tokens: int = 1, of_a_slot: int | None = None
) -> tuple[State, ...]:
    """Return the states of all layers for sequences that have not begun; ``tokens`` of a call can be verified.

    A slot has as many states, or ``of_a_slot``: one is enough where they are replayed. Those of int16, int8 or
    float8_e4m3fn are quantised.

    A tuple, for the layers to be unrolled over: a scan over *stacked* layer states would copy them.
    """
    own = config.of_a_device
    conv = (slots, config.conv_kernel - 1 + tokens - 1, config.devices * own.conv_size)
    ssm = (slots * (of_a_slot or tokens), config.num_heads, config.head_dim, config.state_size)

    def zeros(shape: tuple[int, ...], dtype: str, spec: Any) -> jax.Array:
        return jnp.zeros(shape, dtype, device=config.mesh and NamedSharding(config.mesh, spec))

    return tuple(
        State(zeros(conv, conv_dtype, STATE_SPECS.conv), stored(zeros(ssm, "float32", STATE_SPECS.ssm), ssm_dtype))
        for _ in range(config.num_hidden_layers)
    )


def stored(states: jax.Array, dtype: str) -> Any:
    """Return float32 states as they are stored in a dtype, quantised where it is one of QUANTIZED."""
    return ssu_bridge.QuantizedState.quantize(states, dtype) if dtype in QUANTIZED else states.astype(dtype)


def with_replay(
    config: Mamba2Config, weights: Weights, states: tuple[State, ...], window: int, tokens: int = 1
) -> tuple[tuple[State, ...], ssu_bridge.ReplayCursor]:
    """Return states that are written once in a window of tokens, and the cursor that they share.

    A call has up to so many ``tokens`` of each sequence.
    """
    dtype, groups = weights.embedding.dtype, config.devices * config.of_a_device.n_groups
    sizes = window, tokens, groups, dtype, dtype
    replayed = tuple(state._replace(ssm=ssu_bridge.to_replay(state.ssm, *sizes)) for state in states)
    slots = states[0].conv.shape[0]
    return replayed, ssu_bridge.ReplayCursor.empty(slots, window, tokens, like=states[0].conv)


def step(
    config: Mamba2Config,
    weights: Weights,
    states: tuple[State, ...],
    tokens: jax.Array,
    slots: jax.Array,
    backend: str | None = None,
    cursor: ssu_bridge.ReplayCursor | None = None,
) -> tuple[jax.Array, tuple[State, ...]]:
    """Take one token of each sequence.

    Args:
        config, weights: the model.
        states: of all layers. Donate them to the enclosing ``jax.jit`` to have them updated in place.
        tokens: (batch,) integers.
        slots: (batch,) int32, where the state of each sequence lies; -1 is a place that stands empty.
        backend: who computes the SSM step; None: as configured while this is traced.
        cursor: that of states which are replayed. It is only read: the caller moves it on after the step.

    Returns:
        The logits of the next token, (batch, vocab_size) in float32, and the new states.
    """
    x, states, _ = forward(config, weights, states, tokens, slots, backend=backend, cursor=cursor)
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
    drafts: Drafts | None = None,
    snapshots: Snapshots | None = None,
    backend: str | None = None,
    cursor: ssu_bridge.ReplayCursor | None = None,
) -> tuple[jax.Array, tuple[State, ...], tuple[State, ...] | None]:
    """Take tokens through all layers.

    Args:
        config, weights, states, slots, backend, cursor: as in :func:`step`.
        tokens: (batch,), (batch, length), or with ``rows`` (rows,).
        rows: the sequences of packed rows.
        has_initial_state: (batch,) bool; False for a sequence that begins here, whatever its slot holds.
        drafts: for as many sequences as it names, the first ones. Others, whose rows come after theirs, are read.
        snapshots: of packed rows, for sequences that are read.

    Returns:
        What the last layer makes of the tokens, for :func:`logits`, with their axes; the new states; and the
        snapshots' states, if there are some.
    """
    call = _Call(slots, rows, has_initial_state, drafts, snapshots, backend, cursor)
    kept = None if snapshots is None else snapshots.states
    layers = _layers if config.mesh is None else _layers_over_devices
    return layers(config, call, weights.layers, states, embed(config, weights, tokens), kept)


class _Call(NamedTuple):
    """What is the same for all layers."""

    slots: jax.Array
    rows: Rows | None
    has_initial_state: jax.Array | None
    drafts: Drafts | None
    snapshots: Snapshots | None
    backend: str | None
    cursor: ssu_bridge.ReplayCursor | None

    @property
    def verified(self) -> int:
        """How many sequences are verified."""
        return 0 if self.drafts is None else len(self.drafts.start)


_Kept = tuple[State, ...] | None


def _layers(
    config: Mamba2Config, call: _Call, layers: tuple[Layer, ...], states: tuple[State, ...], x: jax.Array, kept: _Kept
) -> tuple[jax.Array, tuple[State, ...], _Kept]:
    """Take the residual stream of the tokens through all layers."""
    new_states, new_kept = [], []
    for i, (layer, state) in enumerate(zip(layers, states, strict=True)):
        x, state, own = _layer(config, layer, state, x, call, None if kept is None else kept[i])
        new_states.append(state)
        new_kept.append(own)
    return x, tuple(new_states), None if kept is None else tuple(k for k in new_kept if k is not None)


def _layers_over_devices(
    config: Mamba2Config, call: _Call, layers: tuple[Layer, ...], states: tuple[State, ...], x: jax.Array, kept: _Kept
) -> tuple[jax.Array, tuple[State, ...], _Kept]:
    """Do so on several devices: each takes all tokens through its part of each layer, and adds up what leaves it."""
    of_states = (STATE_SPECS,) * len(states)
    of_kept = None if kept is None else (_SNAPSHOT_SPECS,) * len(kept)
    over_devices = jax.shard_map(
        functools.partial(_layers, config.of_a_device, call),
        mesh=config.mesh,
        in_specs=((LAYER_SPECS,) * len(layers), of_states, _ON_ALL, of_kept),
        out_specs=(_ON_ALL, of_states, of_kept),
        check_vma=False,
    )
    return over_devices(layers, states, x, kept)


def _layer(
    config: Mamba2Config, layer: Layer, state: State, x: jax.Array, call: _Call, kept: State | None
) -> tuple[jax.Array, State, State | None]:
    """Take the residual stream of the tokens, (..., hidden_size), through one layer."""
    z, xBC, dt = project(config, layer, x)
    convolved, conv, kept_conv = _convolve(layer, state, xBC, call, kept)
    y, ssm, kept_ssm = _advance(config, layer, state, convolved, dt, call, kept)
    new = None if kept_conv is None or kept_ssm is None else State(kept_conv, kept_ssm)
    return finish(config, layer, x, y, z), State(conv, ssm), new


def _advance(
    config: Mamba2Config, layer: Layer, state: State, xBC: jax.Array, dt: jax.Array, call: _Call, kept: State | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return what the SSM makes of the convolved tokens, its states after them, and those of the snapshots."""
    heads, B, C = split_heads(config, xBC)
    dt, options = step_sizes(config, layer, dt)
    tokens = heads, dt, -jnp.exp(layer.A_log), B, C, layer.D
    step: Callable[..., Any] = functools.partial(ssu_bridge.update, **options, backend=call.backend)
    places, first, edges = _places(state, call.slots), call.verified, call.rows and call.rows.cu_seqlens
    if call.drafts is None:
        y, ssm, *kept_ssm = step(state.ssm, *tokens, **_read_arguments(call, places, kept))
        return y, ssm, kept_ssm[0] if kept_ssm else None
    own: dict[str, Any] = {"cu_seqlens": None if edges is None else edges[: first + 1]}
    if call.cursor is None:
        own |= {"state_batch_indices": places[:first], "dst_state_batch_indices": places[:first]}
        own |= {"num_accepted_tokens": call.drafts.start, "parent_tokens": call.drafts.parents}
    else:  # it knows where to go on
        own |= {"state_batch_indices": places[:first, 0], "replay": call.cursor}
    verified_y, ssm = step(state.ssm, *tokens, **own)
    if edges is None or first == len(places):
        return verified_y, ssm, None
    # What a prompt leaves is a checkpoint, without tokens to replay.
    states = ssm if call.cursor is None else ssm.checkpoint
    y, states, *kept_ssm = step(states, *tokens, **_read_arguments(call, places, kept))
    ssm = states if call.cursor is None else ssm._replace(checkpoint=states)
    is_read = jnp.arange(len(y)) >= edges[first]
    return jnp.where(is_read[:, None, None], y, verified_y), ssm, kept_ssm[0] if kept_ssm else None


def _places(state: State, slots: jax.Array) -> jax.Array:
    """Return where the states of sequences lie, (batch, those of a slot)."""
    of_a_slot = jax.tree.leaves(state.ssm)[0].shape[0] // state.conv.shape[0]
    return jnp.where(
        slots[:, None] < 0, -1, slots[:, None] * of_a_slot + jnp.arange(of_a_slot, dtype=slots.dtype)[None]
    )


def _read_arguments(call: _Call, places: jax.Array, kept: State | None) -> dict[str, Any]:
    """Return the arguments of ``update`` for the sequences that are read, whose rows come after the verified ones."""
    first = call.verified
    arguments: dict[str, Any] = {"state_batch_indices": places[first:, 0]}
    if call.drafts is None:
        arguments["replay"] = call.cursor
    if call.has_initial_state is not None:
        arguments["has_initial_state"] = call.has_initial_state[first:]
    if call.rows is not None:
        arguments["cu_seqlens"] = call.rows.cu_seqlens[first:]
    if kept is not None and call.snapshots is not None:
        arguments["intermediate_states"] = kept.ssm
        arguments["intermediate_state_indices"] = call.snapshots.entries[first:]
        arguments["intermediate_stride"] = call.snapshots.stride
    return arguments


def _convolve(
    layer: Layer, state: State, xBC: jax.Array, call: _Call, kept: State | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return what the convolution makes of its inputs, its cache after them, and that of the snapshots."""
    drafts, weights = call.drafts, (layer.conv, layer.conv_bias)
    history = convolution.histories(
        state.conv, call.slots, has_initial_state=call.has_initial_state, kept=None if drafts is None else drafts.kept
    )
    if call.rows is None:
        inputs = xBC if xBC.ndim == 3 else xBC[:, None]
        parents = None if drafts is None else drafts.parents
        convolved = convolution.convolve(history, inputs, *weights, parents=parents).reshape(xBC.shape)
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
    if config.devices_of_a_group == 1:
        by_group = gated.reshape(*z.shape[:-1], config.n_groups, -1)
        weight = layer.gated_norm.reshape(config.n_groups, -1)
        normed = rms_norm(by_group, weight, config.layer_norm_epsilon).reshape(z.shape)
        out = linear(normed, layer.out_proj, None)
        out = out if config.mesh is None else jax.lax.psum(out, "heads")
    else:
        # The norm goes over the heads of all devices. Its scale comes after the product, so that they wait only once.
        weighted = (gated * over(gated, layer.gated_norm)).astype(layer.out_proj.dtype)
        squares = jnp.sum(gated * gated, axis=-1, keepdims=True)
        out, squares = jax.lax.psum((linear(weighted, layer.out_proj, None), squares), "heads")
        channels = config.inner_size * config.devices_of_a_group
        out = out * jax.lax.rsqrt(squares / channels + config.layer_norm_epsilon)
    out = out if layer.out_proj_bias is None else out + over(out, layer.out_proj_bias)
    x = x + out.astype(x.dtype)
    # Without the barrier XLA computes x anew in each layer, from the sums over devices of all layers before.
    return x if config.mesh is None else jax.lax.optimization_barrier(x)


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
