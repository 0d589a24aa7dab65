"""Generate text: read the prompt in one pass, then decode in one jitted, donated ``lax.scan`` a piece.

python -m mamba2_jax.generate --prompt "In the beginning" --tokens 400
python -m mamba2_jax.generate --checkpoint FOLDER --temperature 0
python -m mamba2_jax.generate --speculate 8 --temperature 0
python -m mamba2_jax.generate --replay 16

With --replay the states are written once in so many tokens and only read in the others.
"""

import argparse
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

import ssu_bridge
from command_line import mistakes_in_one_line, positive
from mamba2_jax import checkpoint, convolution, model
from mamba2_jax.config import Mamba2Config
from mamba2_jax.sampling import DEFAULT, Sampling, sample
from mamba2_jax.text import tokenizer_of

KJV = Path(__file__).parent / "kjv"
PIECE = 16  # tokens between two looks at what has been generated
# The fewest and the most rows of a pass over prompts.
SHORTEST_PASS, LONGEST_PASS = 16, 2048
_Piece = TypeVar("_Piece")


class Progress(NamedTuple):
    """Sequences under way: the states of all layers, the logits of the next token, and how many were drawn.

    ``cursor`` is that of states which are replayed.
    """

    states: tuple[model.State, ...]
    logits: Any
    drawn: Any
    cursor: ssu_bridge.ReplayCursor | None = None

    def replayed(self, config: Mamba2Config, weights: model.Weights, window: int) -> "Progress":
        """Return the same with states that are written once in so many tokens."""
        states, cursor = model.with_replay(config, weights, self.states, window)
        return self._replace(states=states, cursor=cursor)


def prefill(
    config: Mamba2Config,
    weights: model.Weights,
    states: tuple[model.State, ...],
    prompts: Sequence[Sequence[int]],
    slots: jax.Array | np.ndarray,
    backend: str | None = None,
) -> Progress:
    """Read prompts, of at least one token each, into slots; whatever those hold.

    All tokens of a pass are packed into a number of rows that is a power of two, so that prompts of another length
    compile nothing new. Longer prompts take several passes. The states are donated.
    """
    # NumPy's, which every process of several has on all devices.
    progress = Progress(states, np.zeros((len(prompts), config.vocab_size), np.float32), np.zeros((), np.int32))
    most = max(LONGEST_PASS // len(prompts), 1)
    for start in range(0, max(map(len, prompts)), most):
        pieces = [prompt[start : start + most] for prompt in prompts]
        edges = np.cumsum([0, *map(len, pieces)]).astype(np.int32)
        tokens = np.zeros(bucket(edges[-1]), np.int32)
        tokens[: edges[-1]] = np.concatenate([np.asarray(piece, np.int32) for piece in pieces])
        has_state = np.full(len(prompts), start > 0)
        progress = _read(config, weights, *progress[:2], tokens, edges, slots, has_state, backend)
    return progress


def bucket(tokens: int) -> int:
    """Return in how many rows so many tokens are read."""
    return max(SHORTEST_PASS, 1 << (int(tokens) - 1).bit_length())


@functools.partial(jax.jit, static_argnames=("config", "backend"), donate_argnames="states")
def _read(
    config: Mamba2Config,
    weights: model.Weights,
    states: tuple[model.State, ...],
    logits: jax.Array,
    tokens: jax.Array,
    edges: jax.Array,
    slots: jax.Array,
    has_initial_state: jax.Array,
    backend: str | None,
) -> Progress:
    """Read packed tokens; the logits are those after each sequence's last, or those before where it has none."""
    rows = convolution.Rows(edges)
    x, states, _ = model.forward(
        config, weights, states, tokens, slots, rows=rows, has_initial_state=has_initial_state, backend=backend
    )
    last = model.logits(config, weights, x[jnp.maximum(edges[1:] - 1, 0)])
    return Progress(states, jnp.where((rows.lengths > 0)[:, None], last, logits), jnp.zeros((), jnp.int32))


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
        cursor = progress.cursor
        logits, states = model.step(config, weights, progress.states, tokens, slots, backend, cursor)
        if cursor is not None:  # after all layers
            cursor = ssu_bridge.advance_replay(cursor, slots, tokens=1)
        return Progress(states, logits, progress.drawn + 1, cursor), tokens

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
    replay: int | None = None,
) -> Iterator[int]:
    """Yield so many tokens that follow a prompt, as they are decoded; no more after a token that ends the text.

    With ``replay`` the states are written once in so many tokens; the text is the same.

    Raises:
        ValueError: the prompt is empty or has other tokens than the model, or an option is wrong; at once.
    """
    check_request(config, prompt, count, seed)
    return _stream(config, weights, prompt, count, sampling, seed, state_dtype, replay)


def check_request(config: Mamba2Config, prompt: Sequence[int], count: int, seed: int, least: int = 0) -> None:
    """Check what is to be generated.

    Raises:
        ValueError: an argument is wrong; the message names it, what was expected and what came.
    """
    if len(prompt) == 0:
        raise ValueError("prompt: expected at least one token, got none")
    for place, token in enumerate(prompt):
        if not _is_int(token, 0, config.vocab_size - 1):
            raise ValueError(f"prompt: expected tokens from 0 to {config.vocab_size - 1}, got {token!r} at {place}")
    if not _is_int(count, least, 2**31 - 1):
        raise ValueError(f"count: expected an int of {least} or more, got {count!r}")
    if not _is_int(seed, 0, 2**32 - 1):
        raise ValueError(f"seed: expected an int from 0 to 2**32 - 1, got {seed!r}")


def _is_int(value: object, least: int, most: int) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and least <= int(value) <= most


def _stream(
    config: Mamba2Config,
    weights: model.Weights,
    prompt: list[int],
    count: int,
    sampling: Sampling,
    seed: int,
    state_dtype: str,
    replay: int | None,
) -> Iterator[int]:
    states = model.zero_states(config, 1, weights.embedding.dtype.name, state_dtype)
    slots, keys = jnp.zeros(1, jnp.int32), jax.random.key(np.uint32(seed))[None]
    progress = prefill(config, weights, states, [prompt], slots)
    if replay is not None:
        progress = progress.replayed(config, weights, replay)

    def pieces() -> Iterator[jax.Array]:
        nonlocal progress
        for _ in range(0, count, PIECE):
            tokens, progress = decode(config, weights, progress, slots, keys, count=PIECE, sampling=sampling)
            yield tokens

    drawn = itertools.chain.from_iterable(np.asarray(tokens)[0].tolist() for tokens in one_ahead(pieces()))
    for token in itertools.islice(drawn, count):
        yield token
        if token in config.eos_token_ids:
            return


def one_ahead(pieces: Iterator[_Piece]) -> Iterator[_Piece]:
    """Yield each piece after the next one has begun, so that the device goes on while the host reads."""
    before: list[_Piece] = []
    for piece in pieces:
        yield from before
        before = [piece]
    yield from before


def print_text(folder: Path, prompt: str, count: int, **options: Any) -> None:
    """Load a checkpoint and print a prompt and what follows, as it is generated; ``options`` are those of a stream."""
    config, weights = checkpoint.load(folder)
    tokenizer = tokenizer_of(folder, config)
    tokens, read = tokenizer.encode(prompt), tokenizer.reader()
    reports: list[Any] = []
    if "speculation" in options:
        from mamba2_jax import speculate  # which imports this module

        drawn = speculate.stream(config, weights, tokens, count, **options, report=reports.append)
    else:
        drawn = stream(config, weights, tokens, count, **options)
    for token in itertools.chain(tokens, drawn):
        print(read(token), end="", flush=True)
    print(read.rest())
    for counts in reports:
        print(counts)


def main() -> None:
    """Generate text from a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=KJV, help="a folder in the Hugging Face layout")
    parser.add_argument("--prompt", default="In the beginning")
    parser.add_argument("--tokens", type=int, default=400, help="how many to generate")
    parser.add_argument("--temperature", type=float, default=DEFAULT.temperature)
    parser.add_argument("--top-p", type=float, default=DEFAULT.top_p)
    parser.add_argument("--seed", type=int, default=0)
    dtypes = ["float32", "bfloat16", "float16", *model.QUANTIZED]
    parser.add_argument("--state-dtype", choices=dtypes, default="float32", help="of integers: quantised")
    parser.add_argument("--speculate", type=int, metavar="TOKENS", help="verify so many in a call: see speculate.py")
    parser.add_argument("--branches", type=int, default=1, help="continuations that are verified together, as a tree")
    parser.add_argument("--replay", type=positive, metavar="TOKENS", help="write states once in so many tokens")
    ssu_bridge.add_cli_args(parser)
    arguments = parser.parse_args()
    ssu_bridge.set_config(ssu_bridge.SSUConfig.from_args(arguments))
    with mistakes_in_one_line(parser):
        sampling = Sampling(arguments.temperature, arguments.top_p)
        options = {"sampling": sampling, "seed": arguments.seed, "state_dtype": arguments.state_dtype}
        if arguments.speculate is None:
            options["replay"] = arguments.replay
        else:
            from mamba2_jax.speculate import Speculation

            options["speculation"] = Speculation(arguments.speculate, arguments.branches, replay=arguments.replay)
        print_text(arguments.checkpoint, arguments.prompt, arguments.tokens, **options)


if __name__ == "__main__":
    main()
