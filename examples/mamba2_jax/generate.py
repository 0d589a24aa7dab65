"""Generate text: prefill by scanning the step over the prompt, then decode in one jitted, donated ``lax.scan`` a piece.

python -m mamba2_jax.generate --prompt "In the beginning" --tokens 400
python -m mamba2_jax.generate --checkpoint FOLDER --temperature 0
"""

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import ssu_bridge
from mamba2_jax import checkpoint, model
from mamba2_jax.config import Mamba2Config
from mamba2_jax.sampling import DEFAULT, Sampling, sample
from mamba2_jax.text import tokenizer_of

KJV = Path(__file__).parent / "kjv"
PIECE = 16  # tokens between two looks at what has been generated


class Progress(NamedTuple):
    """Sequences under way: the states of all layers, the logits of the next token, and how many were drawn."""

    states: tuple[model.State, ...]
    logits: jax.Array
    drawn: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "backend"), donate_argnames="states")
def prefill(
    config: Mamba2Config,
    weights: model.Weights,
    states: tuple[model.State, ...],
    prompts: jax.Array,
    slots: jax.Array,
    backend: str | None = None,
) -> Progress:
    """Read prompts (batch, length) of one length, at least 1, token by token into the slots."""

    def token(carry: tuple[tuple[model.State, ...], jax.Array], tokens: jax.Array) -> tuple[Any, None]:
        logits, states = model.step(config, weights, carry[0], tokens, slots, backend)
        return (states, logits), None

    logits = jnp.zeros((prompts.shape[0], config.vocab_size), jnp.float32)
    (states, logits), _ = jax.lax.scan(token, (states, logits), prompts.T)
    return Progress(states, logits, jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames=("config", "count", "sampling", "backend"), donate_argnames="progress")
def decode(
    config: Mamba2Config,
    weights: model.Weights,
    progress: Progress,
    slots: jax.Array,
    keys: jax.Array,
    *,
    count: int,
    sampling: Sampling,
    backend: str | None = None,
) -> tuple[jax.Array, Progress]:
    """Decode so many tokens of each sequence: (batch, count), and the progress to go on from.

    ``keys`` (batch,) are of the sequences; the draws of different tokens follow from how many came before. The layers
    are unrolled in the body of the scan over a tuple of their states, which are donated: XLA then updates each where
    it lies, and copies none.
    """

    def token(progress: Progress, _: None) -> tuple[Progress, jax.Array]:
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, progress.drawn)
        tokens = sample(progress.logits, own, sampling)
        logits, states = model.step(config, weights, progress.states, tokens, slots, backend)
        return Progress(states, logits, progress.drawn + 1), tokens

    progress, tokens = jax.lax.scan(token, progress, None, length=count)
    return tokens.T, progress


def stream(
    config: Mamba2Config,
    weights: model.Weights,
    prompt: list[int],
    count: int,
    *,
    sampling: Sampling = DEFAULT,
    seed: int = 0,
    state_dtype: str = "float32",
) -> Iterator[int]:
    """Yield so many tokens that follow a prompt, as they are decoded.

    Raises:
        ValueError: the prompt is empty, so that there is nothing to follow.
    """
    if not prompt:
        raise ValueError("prompt: expected at least one token, got none")
    states = model.zero_states(config, 1, weights.embedding.dtype.name, state_dtype)
    slots, keys = jnp.zeros(1, jnp.int32), jax.random.key(seed)[None]
    progress = prefill(config, weights, states, jnp.array([prompt], jnp.int32), slots)
    while count > 0:
        tokens, progress = decode(config, weights, progress, slots, keys, count=PIECE, sampling=sampling)
        yield from tokens[0, :count].tolist()
        count -= PIECE


def print_text(folder: Path, prompt: str, count: int, **options: Any) -> None:
    """Load a checkpoint and print a prompt and what follows, as it is generated."""
    config, weights = checkpoint.load(folder)
    tokenizer = tokenizer_of(folder, config)
    read = tokenizer.reader()
    tokens = tokenizer.encode(prompt)
    for token in (*tokens, *stream(config, weights, tokens, count, **options)):
        print(read(token), end="", flush=True)
    print()


def main() -> None:
    """Generate text from a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=KJV, help="a folder in the Hugging Face layout")
    parser.add_argument("--prompt", default="In the beginning")
    parser.add_argument("--tokens", type=int, default=400, help="how many to generate")
    parser.add_argument("--temperature", type=float, default=DEFAULT.temperature)
    parser.add_argument("--top-p", type=float, default=DEFAULT.top_p)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state-dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    ssu_bridge.add_cli_args(parser)
    arguments = parser.parse_args()
    ssu_bridge.set_config(ssu_bridge.SSUConfig.from_args(arguments))
    sampling = Sampling(arguments.temperature, arguments.top_p)
    options = {"sampling": sampling, "seed": arguments.seed, "state_dtype": arguments.state_dtype}
    print_text(arguments.checkpoint, arguments.prompt, arguments.tokens, **options)


if __name__ == "__main__":
    main()
