"""Continuous batching: sequences join and leave a slotted state cache while others go on decoding.

The batch has a fixed number of places, so that everything is compiled once. A sequence takes a free place and a free
slot of the cache when it joins, and gives both back when it ends; an empty place is a pad, whose slot is -1. Prompts
are read by the same step that decodes: a place is fed its prompt token by token while its neighbours draw theirs.

    python -m mamba2_jax.scheduler
"""

import argparse
import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ssu_bridge
from mamba2_jax import checkpoint, model
from mamba2_jax.config import Mamba2Config
from mamba2_jax.generate import KJV
from mamba2_jax.sampling import DEFAULT, Sampling, sample
from mamba2_jax.text import tokenizer_of

_NO_SLOT, _DRAW = -1, -1


@dataclasses.dataclass
class Sequence:
    """A request, and how far it has got.

    Attributes:
        prompt: its tokens, at least one.
        count: how many tokens to draw.
        seed: of its draws, which do not depend on who else is in the batch.
        drawn: the tokens so far.
        slot: of the state cache, while it is in the batch.
    """

    prompt: list[int]
    count: int
    seed: int = 0
    drawn: list[int] = dataclasses.field(default_factory=list)
    slot: int = _NO_SLOT
    _read: int = 0

    def next_feed(self, length: int) -> list[int]:
        """Return what it is fed in the next so many steps: tokens of its prompt, then those that it draws."""
        feed = self.prompt[self._read : self._read + length]
        self._read += len(feed)
        return feed + [_DRAW] * (length - len(feed))

    @property
    def done(self) -> bool:
        """Whether all tokens are drawn."""
        return len(self.drawn) >= self.count


class _Carry(NamedTuple):
    states: tuple[model.State, ...]
    logits: jax.Array
    drawn: jax.Array


class Scheduler:
    """Decodes sequences in a batch of a fixed width.

    Args:
        config, weights: the model.
        width: places of the batch.
        slots: of the state cache; at least ``width``.
        sampling: how tokens are drawn.
        piece: steps between two looks at who has finished and who may join.
        state_dtype: of the SSM states.
    """

    def __init__(
        self,
        config: Mamba2Config,
        weights: model.Weights,
        *,
        width: int,
        slots: int | None = None,
        sampling: Sampling = DEFAULT,
        piece: int = 8,
        state_dtype: str = "float32",
    ):
        slots = width if slots is None else slots
        if slots < width:
            raise ValueError(f"slots: expected at least the width {width}, got {slots}")
        self._config, self._weights, self._sampling, self._piece = config, weights, sampling, piece
        self._waiting: collections.deque[Sequence] = collections.deque()
        self._places: list[Sequence | None] = [None] * width
        self._free_slots = collections.deque(range(slots))
        states = model.zero_states(config, slots, weights.embedding.dtype.name, state_dtype)
        logits = jnp.zeros((width, config.vocab_size), jnp.float32)
        self._carry = _Carry(states, logits, jnp.zeros(width, jnp.int32))

    def submit(self, sequence: Sequence) -> None:
        """Have a sequence join as soon as there is a place.

        Raises:
            ValueError: its prompt is empty.
        """
        if not sequence.prompt:
            raise ValueError("prompt: expected at least one token, got none")
        self._waiting.append(sequence)

    def run(self) -> Iterator[tuple[Sequence, int]]:
        """Decode until nobody is left, yielding each token as it is drawn; more may be submitted meanwhile."""
        while self._waiting or any(self._places):
            yield from self.advance()

    def advance(self) -> list[tuple[Sequence, int]]:
        """Let waiting sequences join, decode a piece, and let those that are done leave."""
        self._admit()
        present = [(place, sequence) for place, sequence in enumerate(self._places) if sequence]
        feed = np.zeros((self._piece, len(self._places)), np.int32)
        slots = np.full(len(self._places), _NO_SLOT, np.int32)
        seeds = np.zeros(len(self._places), np.uint32)
        for place, sequence in present:
            feed[:, place] = sequence.next_feed(self._piece)
            slots[place], seeds[place] = sequence.slot, sequence.seed
        tokens, self._carry = _advance(self._config, self._weights, self._carry, feed, slots, seeds, self._sampling)
        host_tokens = np.asarray(tokens)
        news = []
        for place, sequence in present:
            for token in host_tokens[feed[:, place] == _DRAW, place].tolist()[: sequence.count - len(sequence.drawn)]:
                sequence.drawn.append(token)
                news.append((sequence, token))
            if sequence.done:
                self._free_slots.append(sequence.slot)
                sequence.slot, self._places[place] = _NO_SLOT, None
        return news

    def _admit(self) -> None:
        """Give free places and slots to who waits, and clear what the last owners left in them."""
        cleared = np.full(len(self._places), _NO_SLOT, np.int32)
        for place, sequence in enumerate(self._places):
            if sequence is None and self._waiting:
                joining = self._places[place] = self._waiting.popleft()
                joining.slot = cleared[place] = self._free_slots.popleft()
        if (cleared != _NO_SLOT).any():
            self._carry = _clear(self._carry, cleared)


@functools.partial(jax.jit, donate_argnums=0)
def _clear(carry: _Carry, slots: jax.Array) -> _Carry:
    """Zero these slots of every state; the place of each begins to count its draws anew."""
    joins = slots != _NO_SLOT

    def zeroed(state: jax.Array) -> jax.Array:
        places = jnp.where(joins, slots, state.shape[0])
        return state.at[places].set(0, mode="drop")

    return carry._replace(states=jax.tree.map(zeroed, carry.states), drawn=jnp.where(joins, 0, carry.drawn))


@functools.partial(jax.jit, static_argnames=("config", "sampling"), donate_argnames="carry")
def _advance(
    config: Mamba2Config,
    weights: model.Weights,
    carry: _Carry,
    feed: jax.Array,
    slots: jax.Array,
    seeds: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, _Carry]:
    """Take a step for each row of feed (steps, width): its tokens, or where it says so those drawn from the logits."""
    keys = jax.vmap(jax.random.key)(seeds)

    def token(carry: _Carry, fed: jax.Array) -> tuple[_Carry, jax.Array]:
        draws = fed == _DRAW
        drawn = sample(carry.logits, jax.vmap(jax.random.fold_in)(keys, carry.drawn), sampling)
        tokens = jnp.where(draws, drawn, fed)
        logits, states = model.step(config, weights, carry.states, tokens, slots)
        return _Carry(states, logits, carry.drawn + draws.astype(carry.drawn.dtype)), tokens

    carry, tokens = jax.lax.scan(token, carry, feed)
    return tokens, carry


def main() -> None:
    """Decode more prompts than there are places, and show who comes and goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=3, help="places of the batch")
    parser.add_argument("--tokens", type=int, default=80, help="of the shortest text; each next one is longer")
    ssu_bridge.add_cli_args(parser)
    arguments = parser.parse_args()
    ssu_bridge.set_config(ssu_bridge.SSUConfig.from_args(arguments))
    config, weights = checkpoint.load(KJV)
    tokenizer = tokenizer_of(KJV, config)
    scheduler = Scheduler(config, weights, width=arguments.width, slots=arguments.width + 2)
    prompts = ["In the beginning", "And Moses said", "Blessed are", "And it came to pass", "The LORD is", "Thou shalt"]
    for i, prompt in enumerate(prompts):
        scheduler.submit(Sequence(tokenizer.encode(prompt), arguments.tokens + 20 * i, seed=i))
    drawn: collections.Counter[int] = collections.Counter()
    for sequence, _ in scheduler.run():
        drawn[sequence.seed] += 1
        if drawn[sequence.seed] == 1:
            print(f"sequence {sequence.seed} has joined")
        if drawn[sequence.seed] == sequence.count:
            read = tokenizer.reader()
            text = "".join(map(read, sequence.prompt + sequence.drawn))
            print(f"sequence {sequence.seed} leaves: {text!r}", flush=True)


if __name__ == "__main__":
    main()
