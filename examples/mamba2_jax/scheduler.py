"""Continuous batching: sequences join and leave a slotted state cache while others go on decoding.

The batch has a fixed number of places, and a step a fixed number of rows, so that everything is compiled once. A
sequence takes a free place and a free slot of the cache when it joins, and gives both back when it ends; an empty place
is a pad, whose slot is -1. While prompts are read, a step is one packed call: a row for each sequence that decodes, and
pieces of prompts in the rows that are left. Else several tokens are decoded at once.

With speculation each sequence that decodes has rows for drafts, too, as many as its own text promises.

A prompt that begins like an earlier one starts from the state that was kept on the way through that.

    python -m mamba2_jax.scheduler
"""

import argparse
import collections
from collections.abc import Iterator
from typing import Any

import ssu_bridge
from command_line import mistakes_in_one_line
from mamba2_jax import checkpoint, model
from mamba2_jax.batch import Batch, Chunks, OneRow, Verified
from mamba2_jax.config import Mamba2Config
from mamba2_jax.generate import KJV, check_request
from mamba2_jax.prefix_cache import PrefixCache
from mamba2_jax.requests import Running, Sequence
from mamba2_jax.sampling import DEFAULT, Sampling
from mamba2_jax.speculate import Speculation
from mamba2_jax.text import tokenizer_of


class Scheduler:
    """Decodes sequences in a batch of a fixed width.

    Args:
        config, weights: the model.
        width: places of the batch.
        slots: of the state cache; at least ``width``.
        sampling: how tokens are drawn.
        piece: tokens that are decoded between two looks at who has finished and who may join.
        rows: of a step in which prompts are read: its budget of tokens.
        one_row: have prompts read as texts are decoded, one token in a step, without such a budget; to compare with.
        speculation: how drafts are looked up; None for none.
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
        one_row: bool = False,
        speculation: Speculation | None = None,
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
        if one_row and (prefixes or speculation):
            raise ValueError("one_row: expected neither prefixes nor speculation with it")
        if speculation and speculation.branches > 1:
            raise ValueError(f"speculation: expected one branch in packed rows, got {speculation.branches}")
        self._config = config
        self._waiting: collections.deque[Running] = collections.deque()
        self._places: list[Running | None] = [None] * width
        self._free_slots = collections.deque(range(slots))
        self._cache = PrefixCache(prefixes, prefix_stride) if prefixes else None
        arguments, sizes = (config, weights, sampling, state_dtype), {"width": width, "slots": slots, "piece": piece}
        kept: dict[str, Any] = {"cache": self._cache, "kept": (prefixes, rows // prefix_stride)}
        self.batch: Batch
        if one_row:
            self.batch = OneRow(*arguments, **sizes)
        elif speculation:
            self.batch = Verified(*arguments, **sizes, rows=rows, **kept, speculation=speculation)
        else:
            self.batch = Chunks(*arguments, **sizes, rows=rows, **kept)

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
        self._waiting.append(Running(sequence, prompt, int(sequence.count), int(sequence.seed)))
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
        drawn = self.batch.take(present)
        news = []
        for place, running in present:
            for token in drawn.get(place, ()):
                running.request.drawn.append(token)
                news.append((running.request, token))
                if token in self._config.eos_token_ids or len(running.request.drawn) == running.count:
                    self._leave(place, running, "end token" if token in self._config.eos_token_ids else "count")
                    break
        return news

    def _leave(self, place: int, running: Running, why: str) -> None:
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
                    self.batch.restore(joining.slot, kept)


def _require_at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an int of {least} or more, got {value!r}")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=3, help="places of the batch")
    parser.add_argument("--rows", type=int, default=64, help="tokens of a step in which prompts are read")
    parser.add_argument(
        "--speculate", type=int, metavar="TOKENS", help="verify up to so many of each sequence in a step"
    )
    parser.add_argument("--tokens", type=int, default=80, help="of the shortest text; each next one is longer")
    ssu_bridge.add_cli_args(parser)
    arguments = parser.parse_args()
    ssu_bridge.set_config(ssu_bridge.SSUConfig.from_args(arguments))
    with mistakes_in_one_line(parser):
        speculation = None if arguments.speculate is None else Speculation(arguments.speculate)
        show(arguments.width, arguments.rows, arguments.tokens, speculation)


def show(width: int, rows: int, count: int, speculation: Speculation | None = None) -> None:
    """Decode six prompts, each with more tokens than the one before, and print who joins and leaves."""
    config, weights = checkpoint.load(KJV)
    tokenizer = tokenizer_of(KJV, config)
    prompts = ["In the beginning", "And Moses said", "Blessed are", "And it came to pass", "The LORD is", "Thou shalt"]
    scheduler = Scheduler(config, weights, width=width, slots=width + 2, rows=rows, speculation=speculation)
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
