"""The package mamba2-jax from PyPI with its SSM computed by ``update``: the same logits, and the times of both.

    pip install mamba2-jax jax-tvm-ffi
    python other_libraries/mamba2_jax_package.py
    python other_libraries/mamba2_jax_package.py --hidden-size 768 --layers 1 --batch 1 --prompt 512

Its ``ssd_forward`` computes chunks, and pads a single token to one. Here ``update`` takes a prompt, or a token.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

import mamba2_jax
import ssu_bridge
from mamba2_jax import modeling

ROUNDS = 9


def ssd_forward(
    x, dt, A, B_mat, C_mat, chunk_size, D, dt_bias, dt_min, dt_max, initial_states=None, return_final_states=False
):
    """Compute what the package's function of this name does, with ``update``."""
    dt = jnp.clip(jax.nn.softplus(dt + dt_bias), dt_min, dt_max)
    B, C = B_mat[:, :, :1], C_mat[:, :, :1]  # all heads have the same
    batch, _, heads, headdim = x.shape
    zeros = jnp.zeros((batch, heads, headdim, B.shape[-1]), jnp.float32)
    y, state = ssu_bridge.update(zeros if initial_states is None else initial_states[:, 0], x, dt, A, B, C, D)
    return y, state if return_final_states else None


class Model:
    """A model of the package, with one of the two functions in it."""

    def __init__(self, model, function):
        # Functions of their own each time: JAX keeps programs by function.
        self._model, self._function = model, function
        self._read = jax.jit(lambda model, tokens: model(tokens))
        self._step = jax.jit(lambda model, tokens, cache: model(tokens, cache=cache), donate_argnames="cache")

    def read(self, prompt):
        """Return what comes of a prompt, and the seconds."""
        return self._timed(self._read, prompt)

    def decode(self, prompt, count):
        """Return the logits after a prompt and after each of count greedy tokens, and the seconds of a token."""
        result, _ = self.read(prompt)
        cache = jax.tree.map(jnp.copy, result["cache"])  # in memory of their own, which can be donated
        logits, seconds = [result["logits"][:, -1]], []
        for _ in range(count):
            result, own = self._timed(self._step, logits[-1].argmax(-1)[:, None], cache)
            logits.append(result["logits"][:, -1])
            cache = result["cache"]
            seconds.append(own)
        return jnp.stack(logits), statistics.median(seconds[1:])

    def _timed(self, function, *arguments):
        modeling.ssd_forward = self._function
        started = time.perf_counter()
        result = jax.block_until_ready(function(self._model, *arguments))
        return result, time.perf_counter() - started


def main():
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=8, help="tokens of it")
    parser.add_argument("--tokens", type=int, default=32, help="to decode")
    ssu_bridge.add_cli_args(parser)
    arguments = parser.parse_args()
    if min(arguments.hidden_size, arguments.layers, arguments.batch, arguments.prompt, arguments.tokens - 1) < 1:
        parser.error("expected sizes of at least 1, and at least 2 tokens")
    ssu_bridge.set_config(ssu_bridge.SSUConfig.from_args(arguments))
    try:
        compare(arguments)
    except (ValueError, ssu_bridge.UnsupportedError, ssu_bridge.BackendNotAvailableError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")


def compare(arguments):
    """Read prompts and decode with the package's own function and with the other one."""
    config = mamba2_jax.Mamba2Config(
        vocab_size=512, hidden_size=arguments.hidden_size, num_hidden_layers=arguments.layers
    )
    model = mamba2_jax.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    prompt = jax.random.randint(jax.random.key(0), (arguments.batch, arguments.prompt), 0, config.vocab_size)
    package, replaced = Model(model, modeling.ssd_forward), Model(model, ssd_forward)
    expected, before = package.decode(prompt, arguments.tokens)
    logits, after = replaced.decode(prompt, arguments.tokens)
    error = jnp.abs(logits - expected).max() / jnp.abs(expected).max()
    print(f"largest difference of the logits: {error:.1e} of the largest")
    show("a token", before, after)
    rounds = [(package.read(prompt)[1], replaced.read(prompt)[1]) for _ in range(ROUNDS)]  # in turn
    show("a prompt", *map(statistics.median, zip(*rounds, strict=True)))
    if not error < 1e-5:
        raise SystemExit("the logits differ")


def show(what, before, after):
    """Print two times."""
    ratio = f"{before / after:.1f} times as fast"
    print(f"{what}: {before * 1e3:.2f} ms as the package has it, {after * 1e3:.2f} ms with update, {ratio}")


if __name__ == "__main__":
    main()
