"""The package mamba2-jax from PyPI with its decode step replaced: the same logits, and the time of a token.

    pip install mamba2-jax jax-tvm-ffi
    python other_libraries/mamba2_jax_package.py

Its ``ssd_forward`` pads one token to a chunk. Here a call of one token that starts from states runs ``update`` instead.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

import mamba2_jax
import ssu_bridge
from mamba2_jax import modeling

prompt_form = modeling.ssd_forward


def ssd_forward(x, dt, A, B_mat, C_mat, chunk_size, D, dt_bias, dt_min, dt_max, **states):
    """Compute one token with ``update``, and several as the package does."""
    initial = states.get("initial_states")
    if initial is None or x.shape[1] > 1:
        return prompt_form(x, dt, A, B_mat, C_mat, chunk_size, D, dt_bias, dt_min, dt_max, **states)
    dt = jnp.clip(jax.nn.softplus(dt[:, 0] + dt_bias), dt_min, dt_max)
    B, C = B_mat[:, 0, :1], C_mat[:, 0, :1]  # all heads have the same
    y, state = ssu_bridge.update(initial[:, 0], x[:, 0], dt, A, B, C, D)
    return y[:, None], state


def decoded(model, prompt, count):
    """Return the logits after the prompt and after each of count greedy tokens, and the seconds of a token."""
    # A function of its own each time: JAX keeps programs by function.
    step = jax.jit(lambda model, tokens, cache: model(tokens, cache=cache), donate_argnames="cache")
    result = jax.jit(lambda model, tokens: model(tokens))(model, prompt)
    cache = jax.tree.map(jnp.copy, result["cache"])  # in memory of their own, which can be donated
    logits, seconds = [result["logits"][:, -1]], []
    for _ in range(count):
        started = time.perf_counter()
        result = step(model, logits[-1].argmax(-1)[:, None], cache)
        logits.append(jax.block_until_ready(result["logits"])[:, -1])
        cache = result["cache"]
        seconds.append(time.perf_counter() - started)
    return jnp.stack(logits), statistics.median(seconds[1:])


def main():
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    ssu_bridge.add_cli_args(parser)
    arguments = parser.parse_args()
    if min(arguments.hidden_size, arguments.layers, arguments.batch, arguments.tokens - 1) < 1:
        parser.error("expected sizes of at least 1, and at least 2 tokens")
    ssu_bridge.set_config(ssu_bridge.SSUConfig.from_args(arguments))
    try:
        compare(arguments)
    except (ValueError, ssu_bridge.UnsupportedError, ssu_bridge.BackendNotAvailableError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")


def compare(arguments):
    """Decode with the package's own step and with the replaced one."""
    config = mamba2_jax.Mamba2Config(
        vocab_size=512, hidden_size=arguments.hidden_size, num_hidden_layers=arguments.layers
    )
    model = mamba2_jax.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    prompt = jax.random.randint(jax.random.key(0), (arguments.batch, 8), 0, config.vocab_size)
    run = functools.partial(decoded, model, prompt, arguments.tokens)
    expected, before = run()
    modeling.ssd_forward = ssd_forward
    logits, after = run()
    error = jnp.abs(logits - expected).max() / jnp.abs(expected).max()
    print(f"largest difference of the logits: {error:.1e} of the largest")
    print(f"a token: {before * 1e3:.2f} ms as the package has it, {after * 1e3:.2f} ms with update")
    print(f"{before / after:.1f} times as fast")
    if not error < 1e-5:
        raise SystemExit("the logits differ")


if __name__ == "__main__":
    main()
