"""Decode with a stack of Mamba-2 layers in JAX: every token of every layer goes through ``ssu_bridge.update``.

The layers have the sizes of mamba2-130m (24 layers, nheads 24, headdim 64, dstate 128, one group) and random weights.
All tokens are decoded in one jitted ``lax.scan`` whose carry is a tuple with the states of each layer: the layers are
unrolled in its body, and the states are donated, so that each is updated in the memory that it came in. (A scan over
*stacked* layer states would copy them.) The same program is then run with the xla backend for comparison.

    python examples/decode_jax.py --batch 8 --tokens 32
"""

import argparse
import functools
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import ssu_bridge

LAYERS, D_MODEL, NHEADS, HEADDIM, DSTATE, NGROUPS, D_CONV = 24, 768, 24, 64, 128, 1, 4
D_INNER = NHEADS * HEADDIM
CONV_DIM = D_INNER + 2 * NGROUPS * DSTATE


class Layer(NamedTuple):
    """The weights of one Mamba-2 layer."""

    norm: jax.Array
    in_proj: jax.Array
    conv: jax.Array
    conv_bias: jax.Array
    A: jax.Array
    D: jax.Array
    dt_bias: jax.Array
    gated_norm: jax.Array
    out_proj: jax.Array


class State(NamedTuple):
    """What one layer carries from token to token: the last inputs of its convolution, and its SSM states by slot."""

    conv: jax.Array
    ssm: jax.Array


def random_layer(key: jax.Array) -> Layer:
    """Draw weights as a trained layer has them: dt from 0.001 to 0.1 and A from -16 to -1."""
    keys = jax.random.split(key, 5)
    dt = jnp.exp(jax.random.uniform(keys[0], (NHEADS,), minval=jnp.log(0.001), maxval=jnp.log(0.1)))
    in_dim = 2 * D_INNER + 2 * NGROUPS * DSTATE + NHEADS
    return Layer(
        norm=jnp.ones(D_MODEL),
        in_proj=jax.random.normal(keys[1], (D_MODEL, in_dim)) * D_MODEL**-0.5,
        conv=jax.random.normal(keys[2], (D_CONV, CONV_DIM)) * D_CONV**-0.5,
        conv_bias=jnp.zeros(CONV_DIM),
        A=-jax.random.uniform(keys[3], (NHEADS,), minval=1.0, maxval=16.0),
        D=jnp.ones(NHEADS),
        dt_bias=dt + jnp.log(-jnp.expm1(-dt)),
        gated_norm=jnp.ones(D_INNER),
        out_proj=jax.random.normal(keys[4], (D_INNER, D_MODEL)) * (D_INNER * LAYERS) ** -0.5,
    )


def rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Scale x to a mean square of one along its last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight


def layer_step(layer: Layer, state: State, x: jax.Array, slots: jax.Array, backend: str) -> tuple[jax.Array, State]:
    """Take one token of each sequence through one layer: x is (batch, D_MODEL)."""
    z, xBC, dt = jnp.split(rms_norm(x, layer.norm) @ layer.in_proj, [D_INNER, D_INNER + CONV_DIM], axis=-1)
    window = jnp.concatenate([state.conv, xBC[:, None]], axis=1)
    xBC = jax.nn.silu(jnp.sum(window * layer.conv, axis=1) + layer.conv_bias)
    heads, B, C = jnp.split(xBC, [D_INNER, D_INNER + NGROUPS * DSTATE], axis=-1)
    y, ssm = ssu_bridge.update(
        state.ssm,
        heads.reshape(-1, NHEADS, HEADDIM),
        dt,
        layer.A,
        B.reshape(-1, NGROUPS, DSTATE),
        C.reshape(-1, NGROUPS, DSTATE),
        layer.D,
        dt_bias=layer.dt_bias,
        dt_softplus=True,
        state_batch_indices=slots,
        backend=backend,
    )
    y = rms_norm(y.reshape(-1, D_INNER) * jax.nn.silu(z), layer.gated_norm)
    return x + y @ layer.out_proj, State(window[:, 1:], ssm)


@functools.partial(jax.jit, static_argnames=("tokens", "backend"), donate_argnames="states")
def decode(
    layers: tuple[Layer, ...], states: tuple[State, ...], x: jax.Array, slots: jax.Array, *, tokens: int, backend: str
) -> tuple[jax.Array, tuple[State, ...]]:
    """Decode so many tokens; each layer stack's output is the next token's input."""

    def token(carry: Any, _: None) -> tuple[Any, None]:
        x, states = carry
        new_states = []
        for layer, state in zip(layers, states, strict=True):
            x, state = layer_step(layer, state, x, slots, backend)
            new_states.append(state)
        return (rms_norm(x, jnp.ones(D_MODEL)), tuple(new_states)), None

    (x, states), _ = jax.lax.scan(token, (x, states), None, length=tokens)
    return x, states


def fresh_states(batch: int, dtype: str) -> tuple[State, ...]:
    """Allocate the states of all layers, with a few more slots than sequences, as a server has them."""
    shape = (batch + 2, NHEADS, HEADDIM, DSTATE)
    return tuple(State(jnp.zeros((batch, D_CONV - 1, CONV_DIM)), jnp.zeros(shape, dtype)) for _ in range(LAYERS))


def assert_no_copy_of_a_state(compiled: Any, state: jax.Array) -> None:
    """Look for a copy of an SSM state in a compiled program, and for room to hold one."""
    name = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[state.dtype.name]
    shape = re.escape(f"{name}[{','.join(map(str, state.shape))}]")
    copies = re.findall(rf"= {shape}\S* copy\(", compiled.as_text())
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert not copies, f"{len(copies)} copies of a state in the compiled program"
    assert temporary < state.nbytes, f"{temporary} bytes of temporaries, room for a state of {state.nbytes}"
    print(
        f"  the compiled program copies no state: {temporary / 1e6:.1f} MB of temporaries, {LAYERS} states of "
        f"{state.nbytes / 1e6:.1f} MB"
    )


def tokens_per_second(
    layers: tuple[Layer, ...], x: jax.Array, slots: jax.Array, *, tokens: int, backend: str, dtype: str
) -> float:
    """Compile the program for a backend, run it once to warm up, and time it."""
    states = fresh_states(x.shape[0], dtype)
    compiled = decode.lower(layers, states, x, slots, tokens=tokens, backend=backend).compile()
    if backend != "xla":  # whose arithmetic makes a new state before it is written to its slot
        assert_no_copy_of_a_state(compiled, states[0].ssm)
    _, states = compiled(layers, states, x, slots)
    started = time.perf_counter()
    jax.block_until_ready(compiled(layers, states, x, slots))
    return tokens * x.shape[0] / (time.perf_counter() - started)


def main() -> None:
    """Decode with the configured backend and with xla, and check a step against the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="sequences decoded together")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each sequence")
    parser.add_argument("--state-dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    ssu_bridge.add_cli_args(parser)
    arguments = parser.parse_args()
    ssu_bridge.set_config(ssu_bridge.SSUConfig.from_args(arguments))

    keys = jax.random.split(jax.random.key(0), LAYERS + 1)
    layers = tuple(map(random_layer, keys[1:]))
    x = jax.random.normal(keys[0], (arguments.batch, D_MODEL))
    slots = jnp.arange(arguments.batch, 0, -1, dtype=jnp.int32)

    state = jax.random.normal(keys[0], (arguments.batch + 2, NHEADS, HEADDIM, DSTATE)).astype(arguments.state_dtype)
    heads = jax.random.normal(keys[1], (arguments.batch, NHEADS, HEADDIM))
    B, C = jax.random.normal(keys[2], (2, arguments.batch, NGROUPS, DSTATE))
    dt = jax.random.normal(keys[3], (arguments.batch, NHEADS))
    step = (state, heads, dt, layers[0].A, B, C, layers[0].D, None, layers[0].dt_bias, True, slots)
    explanation = ssu_bridge.explain(*step)
    print(f"which backend runs, and why:\n{explanation}\n")
    if explanation.backend is None:
        raise SystemExit(1)

    sizes = {"tokens": arguments.tokens, "dtype": arguments.state_dtype}
    print(f"{LAYERS} layers, batch {arguments.batch}, {arguments.tokens} tokens, {arguments.state_dtype} states")
    rates = {b: tokens_per_second(layers, x, slots, backend=b, **sizes) for b in (str(explanation.backend), "xla")}
    for backend, rate in rates.items():
        print(f"  {backend:<12}{rate:8.1f} tokens/s  {rate / rates['xla']:.2f} times xla")

    report = ssu_bridge.check(*step)
    print(report)
    print(f"verdict: {'pass' if report else 'FAIL'}")
    raise SystemExit(0 if report else 1)


if __name__ == "__main__":
    main()
