"""Continuous batching: sequences join and leave a slotted state cache while others go on decoding.

The batch has a fixed number of places, and a step a fixed number of rows, so that everything is compiled once. A
sequence takes a free place and a free slot of the cache when it joins, and gives both back when it ends; an empty place
is a pad, whose slot is -1. While prompts are read, a step is one packed call: a row for each sequence that decodes, and
pieces of prompts in the rows that are left. Else several tokens are decoded at once.

A prompt that begins like an earlier one starts from the state that was kept on the way through that.

    python -m mamba2_jax.scheduler
"""

import argparse
import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ssu_bridge
from command_line import mistakes_in_one_line
from mamba2_jax import checkpoint, convolution, model
from mamba2_jax.config import Mamba2Config
from mamba2_jax.generate import KJV, check_request
from mamba2_jax.prefix_cache import PrefixCache
from mamba2_jax.sampling import DEFAULT, Sampling, sample
from mamba2_jax.text import tokenizer_of

_NO_SLOT, _NO_ENTRY, _DRAW = -1, -1, -1


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request, and what came of it. What it asks for is read when it is submitted, and not again.

    Attributes:
        prompt: its tokens, at least one.
        count: how many tokens to draw.
        seed: of its draws, which do not depend on who else is in the batch.
        drawn: the tokens so far.
        ended: why there will be no more: "count", "end token" or "aborted"; "" while there will be.
    """

    prompt: list[int]
    count: int
    seed: int = 0
    drawn: list[int] = dataclasses.field(default_factory=list)
    ended: str = ""
    _submitted: bool = False

    @property
    def done(self) -> bool:
        """Whether there will be no more tokens."""
        return bool(self.ended)


@dataclasses.dataclass(eq=False)
class _Running:
    """A request as it was submitted, and how far it has got."""

    request: Sequence
    prompt: tuple[int, ...]
    count: int
    seed: int
    slot: int = _NO_SLOT
    read: int = 0

    @property
    def unread(self) -> int:
        return len(self.prompt) - self.read


class _Carry(NamedTuple):
    states: tuple[model.State, ...]
    snapshots: tuple[model.State, ...]
    logits: jax.Array
    drawn: jax.Array


class Scheduler:
    """Decodes sequences in a batch of a fixed width.

    Args:
        config, weights: the model.
        width: places of the batch.
        slots: of the state cache; at least ``width``.
        sampling: how tokens are drawn.
        piece: tokens that are decoded between two looks at who has finished and who may join.
        rows: of a step in which prompts are read: its budget of tokens.
        prefixes: how many pieces of prompts the prefix cache keeps states of; 0 for none, else at least ``width``.
        prefix_stride: after how many tokens each.
        state_dtype: of the SSM states.

    Raises:
        ValueError: a number is out of its range; the message names it.
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
        rows: int = 64,
        prefixes: int = 0,
        prefix_stride: int = 32,
        state_dtype: str = "float32",
    ):
        for name, value, least in (("width", width, 1), ("piece", piece, 1), ("prefixes", prefixes, 0)):
            _require_at_least(name, value, least)
        _require_at_least("prefix_stride", prefix_stride, 1)
        if prefixes:  # no two sequences of a step keep states in one entry
            _require_at_least("prefixes", prefixes, width)
        slots = width if slots is None else slots
        if slots < width:
            raise ValueError(f"slots: expected at least the width {width}, got {slots}")
        # All others may decode, and a piece that is kept has a stride's length or more.
        _require_at_least("rows", rows, width - 1 + (prefix_stride if prefixes else 1))
        self._config, self._weights, self._sampling, self._piece, self._rows = config, weights, sampling, piece, rows
        self._waiting: collections.deque[_Running] = collections.deque()
        self._places: list[_Running | None] = [None] * width
        self._free_slots = collections.deque(range(slots))
        self._cache = PrefixCache(prefixes, prefix_stride) if prefixes else None
        dtypes = weights.embedding.dtype.name, state_dtype
        states, kept = model.zero_states(config, slots, *dtypes), ()
        if prefixes:
            steps = rows // prefix_stride
            flat = model.zero_states(config, prefixes * steps, *dtypes)
            kept = jax.tree.map(lambda array: array.reshape(prefixes, steps, *array.shape[1:]), flat)
        logits = jnp.zeros((width, config.vocab_size), jnp.float32)
        self._carry = _Carry(states, kept, logits, jnp.zeros(width, jnp.int32))

    def submit(self, sequence: Sequence) -> None:
        """Have a sequence join as soon as there is a place.

        Raises:
            TypeError: it is no Sequence.
            ValueError: its prompt, count or seed is wrong, or it was submitted before; nothing has been changed then.
        """
        if not isinstance(sequence, Sequence):
            raise TypeError(f"sequence: expected a Sequence, got {type(sequence).__name__}")
        if sequence._submitted or sequence.drawn:
            raise ValueError("sequence: expected a new one, got one that was submitted before; make another")
        check_request(self._config, sequence.prompt, sequence.count, sequence.seed, least=1)
        prompt = tuple(map(int, sequence.prompt))
        self._waiting.append(_Running(sequence, prompt, int(sequence.count), int(sequence.seed)))
        sequence._submitted = True

    def abort(self, sequence: Sequence) -> None:
        """Have a sequence leave, or wait no longer; its place is free at once. One that has ended stays as it is."""
        for waiting in self._waiting:
            if waiting.request is sequence:
                self._waiting.remove(waiting)
                sequence.ended = "aborted"
                return
        for place, running in enumerate(self._places):
            if running is not None and running.request is sequence:
                self._leave(place, running, "aborted")
                return

    def run(self) -> Iterator[tuple[Sequence, int]]:
        """Decode until nobody is left, yielding each token as it is drawn; more may be submitted meanwhile."""
        while self._waiting or any(self._places):
            yield from self.advance()

    def advance(self) -> list[tuple[Sequence, int]]:
        """Let waiting sequences join, read pieces of prompts or decode, and let those that are done leave."""
        self._admit()
        present = [(place, running) for place, running in enumerate(self._places) if running]
        step = self._read_prompts if any(running.unread for _, running in present) else self._decode
        drawn = step(present)
        news = []
        for place, running in present:
            for token in drawn.get(place, ()):
                running.request.drawn.append(token)
                news.append((running.request, token))
                if token in self._config.eos_token_ids or len(running.request.drawn) == running.count:
                    self._leave(place, running, "end token" if token in self._config.eos_token_ids else "count")
                    break
        return news

    def _leave(self, place: int, running: _Running, why: str) -> None:
        self._free_slots.append(running.slot)
        self._places[place] = None
        running.request.ended = why

    def _admit(self) -> None:
        """Give free places and slots to who waits, with the state after what was read of its prompt before."""
        for place, running in enumerate(self._places):
            if running is None and self._waiting:
                joining = self._places[place] = self._waiting.popleft()
                joining.slot = self._free_slots.popleft()
                found = self._cache and self._cache.longest(joining.prompt)
                if found:
                    joining.read, kept = found
                    self._carry = _restore(self._carry, joining.slot, *kept)

    def _read_prompts(self, present: list[tuple[int, _Running]]) -> dict[int, list[int]]:
        """Take a step of packed rows; return what was drawn in each place."""
        width, left = len(self._places), self._rows - sum(not running.unread for _, running in present)
        pieces: list[list[int]] = [[] for _ in range(width)]
        slots, entries = np.full(width, _NO_SLOT, np.int32), np.full(width, _NO_ENTRY, np.int32)
        seeds, begins = np.zeros(width, np.uint32), np.zeros(width, np.bool_)
        drawing = [place for place, running in present if not running.unread]
        for place, running in present:
            slots[place], seeds[place], begins[place] = running.slot, running.seed, running.read == 0
            if not running.unread:
                pieces[place] = [_DRAW]
                continue
            length = min(running.unread, left)
            if self._cache and length < running.unread:  # the next piece begins where states are kept
                length -= length % self._cache.stride
            start, running.read, left = running.read, running.read + length, left - length
            pieces[place] = list(running.prompt[start : running.read])
            if self._cache and length:
                entries[place] = self._cache.keep(running.prompt, start, running.read)
        fed = np.zeros(self._rows, np.int32)
        fed[: sum(map(len, pieces))] = [token for piece in pieces for token in piece]
        edges = np.cumsum([0, *map(len, pieces)]).astype(np.int32)
        stride = self._cache.stride if self._cache else 0
        call = _Step(fed, edges, slots, ~begins, entries, seeds)
        tokens, self._carry = _mixed(self._config, self._weights, self._carry, call, self._sampling, stride)
        host_tokens = np.asarray(tokens).tolist()
        return {place: [host_tokens[place]] for place in drawing}

    def _decode(self, present: list[tuple[int, _Running]]) -> dict[int, list[int]]:
        """Decode a piece; return what was drawn in each place."""
        slots, seeds = np.full(len(self._places), _NO_SLOT, np.int32), np.zeros(len(self._places), np.uint32)
        for place, running in present:
            slots[place], seeds[place] = running.slot, running.seed
        tokens, self._carry = _several(
            self._config, self._weights, self._carry, slots, seeds, self._sampling, self._piece
        )
        host_tokens = np.asarray(tokens)
        return {place: host_tokens[:, place].tolist() for place, _ in present}


def _require_at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an int of {least} or more, got {value!r}")


class _Step(NamedTuple):
    """A step of packed rows: its tokens, of which _DRAW stands for one to draw, and what belongs to each place."""

    fed: Any
    edges: Any
    slots: Any
    has_initial_state: Any
    entries: Any
    seeds: Any


@functools.partial(jax.jit, donate_argnums=0)
def _restore(carry: _Carry, slot: jax.Array, entry: jax.Array, step: jax.Array) -> _Carry:
    """Put a kept state into a slot."""

    def put(state: jax.Array, kept: jax.Array) -> jax.Array:
        return state.at[slot].set(kept[entry, step])

    return carry._replace(states=jax.tree.map(put, carry.states, carry.snapshots))


@functools.partial(jax.jit, static_argnames=("config", "sampling", "stride"), donate_argnames="carry")
def _mixed(
    config: Mamba2Config, weights: model.Weights, carry: _Carry, call: _Step, sampling: Sampling, stride: int
) -> tuple[jax.Array, _Carry]:
    """Take a step of packed rows; return the token that each place would draw, (width,)."""
    rows = convolution.Rows(call.edges)
    draws = call.fed == _DRAW
    drawn = _drawn(carry, call.seeds, sampling)
    tokens = jnp.where(draws, drawn[rows.sequences(len(call.fed))], call.fed)
    snapshots = model.Snapshots(carry.snapshots, call.entries, stride) if stride else None
    x, states, kept = model.forward(
        config,
        weights,
        carry.states,
        tokens,
        call.slots,
        rows=rows,
        has_initial_state=call.has_initial_state,
        snapshots=snapshots,
    )
    last = jnp.maximum(call.edges[1:] - 1, 0)
    has_rows = rows.lengths > 0
    logits = jnp.where(has_rows[:, None], model.logits(config, weights, x[last]), carry.logits)
    count = jnp.where(has_rows & draws[last], carry.drawn + 1, 0)
    return drawn, _Carry(states, carry.snapshots if kept is None else kept, logits, count)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "piece"), donate_argnames="carry")
def _several(
    config: Mamba2Config,
    weights: model.Weights,
    carry: _Carry,
    slots: jax.Array,
    seeds: jax.Array,
    sampling: Sampling,
    piece: int,
) -> tuple[jax.Array, _Carry]:
    """Decode a piece of each sequence: (piece, width)."""

    def token(carry: _Carry, _: None) -> tuple[_Carry, jax.Array]:
        tokens = _drawn(carry, seeds, sampling)
        logits, states = model.step(config, weights, carry.states, tokens, slots)
        return _Carry(states, carry.snapshots, logits, carry.drawn + 1), tokens

    carry, tokens = jax.lax.scan(token, carry, None, length=piece)
    return tokens, carry


def _drawn(carry: _Carry, seeds: jax.Array, sampling: Sampling) -> jax.Array:
    """Draw a token for each place: what it is depends on the sequence's seed, logits and how many it drew before."""
    keys = jax.vmap(jax.random.key)(seeds)
    return sample(carry.logits, jax.vmap(jax.random.fold_in)(keys, carry.drawn), sampling)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=3, help="places of the batch")
    parser.add_argument("--rows", type=int, default=64, help="tokens of a step in which prompts are read")
    parser.add_argument("--tokens", type=int, default=80, help="of the shortest text; each next one is longer")
    ssu_bridge.add_cli_args(parser)
    arguments = parser.parse_args()
    ssu_bridge.set_config(ssu_bridge.SSUConfig.from_args(arguments))
    with mistakes_in_one_line(parser):
        show(arguments.width, arguments.rows, arguments.tokens)


def show(width: int, rows: int, count: int) -> None:
    """Decode six prompts, each with more tokens than the one before, and print who joins and leaves."""
    config, weights = checkpoint.load(KJV)
    tokenizer = tokenizer_of(KJV, config)
    prompts = ["In the beginning", "And Moses said", "Blessed are", "And it came to pass", "The LORD is", "Thou shalt"]
    scheduler = Scheduler(config, weights, width=width, slots=width + 2, rows=rows)
    for i, prompt in enumerate(prompts):
        scheduler.submit(Sequence(tokenizer.encode(prompt), count + 20 * i, seed=i))
    read_so_far: collections.Counter[int] = collections.Counter()
    for sequence, _ in scheduler.run():
        read_so_far[sequence.seed] += 1
        if read_so_far[sequence.seed] == 1:
            print(f"sequence {sequence.seed} has joined")
        if sequence.done and read_so_far[sequence.seed] == len(sequence.drawn):
            read = tokenizer.reader()
            text = "".join(map(read, sequence.prompt + sequence.drawn)) + read.rest()
            print(f"sequence {sequence.seed} leaves: {text!r}", flush=True)


if __name__ == "__main__":
    main()
