"""Steps of a batch: what is fed to the model in one, and what was drawn.

All of them take who is present, with their places, and return the tokens that were drawn in each place. Those of a
request follow from its seed, its prompt and how many were drawn before: who shares the batch changes nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mamba2_jax import model, steps
from mamba2_jax.config import Mamba2Config
from mamba2_jax.generate import bucket
from mamba2_jax.prefix_cache import Place, PrefixCache
from mamba2_jax.requests import Present
from mamba2_jax.sampling import Sampling
from mamba2_jax.speculate import Counts, Speculation, look_up

Drawn = dict[int, list[int]]


class Batch:
    """What the steps have in common: the model, the states, and a width of places.

    Args:
        config, weights, sampling, state_dtype: the model's, and how tokens are drawn.
        width, slots: places, and slots of the state cache.
        tokens: of a sequence that can be verified in a step.
        replay: the window of states that are replayed; None for states that are written in each step.
        cache: which states on the way through prompts are kept, and ``kept`` how many.
    """

    def __init__(
        self,
        config: Mamba2Config,
        weights: model.Weights,
        sampling: Sampling,
        state_dtype: str,
        *,
        width: int,
        slots: int,
        tokens: int = 1,
        replay: int | None = None,
        cache: PrefixCache | None = None,
        kept: tuple[int, int] = (0, 0),
    ):
        self.config, self.weights, self.sampling, self.width, self.cache = config, weights, sampling, width, cache
        of_a_slot, dtypes = tokens if replay is None else 1, (weights.embedding.dtype.name, state_dtype)
        states = model.zero_states(config, slots, *dtypes, tokens=tokens, of_a_slot=of_a_slot)
        snapshots = (
            jax.tree.map(lambda array: jnp.zeros((*kept, *array.shape[1:]), array.dtype), states) if cache else ()
        )
        cursor = None
        if replay is not None:
            states, cursor = model.with_replay(config, weights, states, replay, tokens)
        logits = jnp.zeros((width, config.vocab_size), jnp.float32)
        self.carry = steps.Carry(states, snapshots, logits, jnp.zeros(width, jnp.int32), cursor)

    def take(self, present: Present) -> Drawn:
        """Take a step, or several."""
        raise NotImplementedError

    def restore(self, slot: int, place: Place) -> None:
        """Put a state that was kept into a slot."""
        self.carry = steps.restore(self.carry, slot, *place)

    @property
    def stride(self) -> int:
        """After how many tokens of a prompt a state is kept; 0 if none is."""
        return self.cache.stride if self.cache else 0

    def by_place(self, present: Present, attribute: str, default: int, dtype: Any = np.int32) -> np.ndarray:
        """Return an attribute of each place, with a default for those that are empty."""
        found = np.full(self.width, default, dtype)
        for place, running in present:
            found[place] = getattr(running, attribute)
        return found


class OneRow(Batch):
    """A row for each sequence in each step, whether it decodes or its prompt is read; so many steps at a time."""

    def __init__(self, *arguments: Any, piece: int, **options: Any):
        super().__init__(*arguments, **options)
        self._piece = piece

    def take(self, present: Present) -> Drawn:
        """Take a piece of steps."""
        fed, begins = np.full((self._piece, self.width), steps.DRAW, np.int32), np.zeros(self.width, np.bool_)
        reads = {}
        for place, running in present:
            own = running.prompt[running.read : running.read + self._piece]
            fed[: len(own), place], begins[place], reads[place] = own, running.read == 0, len(own)
            running.read += len(own)
        slots, seeds = self.by_place(present, "slot", -1), self.by_place(present, "seed", 0, np.uint32)
        whole_model = self.config, self.weights
        tokens, self.carry = steps.one_row(*whole_model, self.carry, fed, begins, slots, seeds, self.sampling)
        host_tokens = np.asarray(tokens)
        return {place: host_tokens[count:, place].tolist() for place, count in reads.items()}


class Chunks(Batch):
    """While prompts are read, packed steps: a row for each sequence that decodes, pieces of prompts in the others."""

    def __init__(self, *arguments: Any, piece: int, rows: int, **options: Any):
        super().__init__(*arguments, **options)
        self._piece, self._rows = piece, rows

    def take(self, present: Present) -> Drawn:
        """Take a step in which prompts are read, or a piece of steps if there is none to read."""
        if any(running.unread for _, running in present):
            return self._read(present)
        slots, seeds = self.by_place(present, "slot", -1), self.by_place(present, "seed", 0, np.uint32)
        tokens, self.carry = steps.several(
            self.config, self.weights, self.carry, slots, seeds, self.sampling, self._piece
        )
        host_tokens = np.asarray(tokens)
        return {place: host_tokens[:, place].tolist() for place, _ in present}

    def _read(self, present: Present) -> Drawn:
        drawing = [place for place, running in present if not running.unread]
        goes_on = self.by_place(present, "read", 0) > 0
        pieces, entries = self.pieces(present, self._rows - len(drawing))
        for place in drawing:
            pieces[place] = [steps.DRAW]
        fed, edges = _packed(pieces, self._rows)
        slots, seeds = self.by_place(present, "slot", -1), self.by_place(present, "seed", 0, np.uint32)
        call = steps.Step(fed, edges, slots, goes_on, entries, seeds)
        tokens, self.carry = steps.mixed(self.config, self.weights, self.carry, call, self.sampling, self.stride)
        host_tokens = np.asarray(tokens).tolist()
        return {place: [host_tokens[place]] for place in drawing}

    def pieces(self, present: Present, left: int) -> tuple[list[list[int]], np.ndarray]:
        """Return what of each place's prompt is read in so many rows, and the entries for states on the way."""
        pieces: list[list[int]] = [[] for _ in range(self.width)]
        entries = np.full(self.width, -1, np.int32)
        for place, running in present:
            length = min(running.unread, left)
            if self.cache and length < running.unread:  # the next piece begins where states are kept
                length -= length % self.cache.stride
            start, running.read, left = running.read, running.read + length, left - length
            pieces[place] = list(running.prompt[start : running.read])
            if self.cache and length:
                entries[place] = self.cache.keep(running.prompt, start, running.read)
        return pieces, entries


class Verified(Chunks):
    """Packed steps always, with rows for the drafts of each sequence that decodes: as many as its own text promises.

    Drafts have at most half of the rows that are left while prompts are read.
    """

    def __init__(self, *arguments: Any, speculation: Speculation, **options: Any):
        super().__init__(*arguments, tokens=speculation.tokens, replay=speculation.replay, **options)
        self._speculation, self.counts = speculation, Counts(0, 0, 0)

    def take(self, present: Present) -> Drawn:
        """Take a step in which drafts are verified and prompts read."""
        decoding = [(place, running) for place, running in present if not running.unread]
        reading = [(place, running) for place, running in present if running.unread]
        room = self._rows - len(decoding)
        drafts = self._drafts(decoding, room // 2 if reading else room)
        own: list[list[int]] = [[] for _ in range(self.width)]
        for place, running in decoding:
            own[place] = [running.request.drawn[-1], *drafts[place]]
        goes_on = self.by_place(present, "read", 0) > 0
        rows = sum(map(len, own))
        pieces, entries = self.pieces(reading, self._rows - rows)
        tokens, accepted = self._call(present, own, pieces if reading else [], goes_on, entries)
        drawn: Drawn = {}
        for place, running in decoding:
            count, drafted = accepted[place], len(drafts[place])
            drawn[place], running.accepted, running.rejected = tokens[place][: count + 1], count, drafted - count
            self.counts = Counts(*map(sum, zip(self.counts, (1, drafted, count), strict=True)))
        for place, running in reading:
            if not running.unread:
                drawn[place], running.accepted, running.rejected = tokens[place][:1], 0, 0
        return drawn

    def _drafts(self, decoding: Present, room: int) -> Drawn:
        """Return the drafts of each place, all together as many as there is room for."""
        texts = [np.array([*running.prompt, *running.request.drawn], np.int32) for _, running in decoding]
        if not texts:
            return {}
        lengths = np.array(list(map(len, texts)))
        padded = np.stack([np.pad(text, (0, lengths.max() - len(text))) for text in texts])
        found, drafts = look_up(padded, lengths, self._speculation, np), {}
        for (place, running), own, matched in zip(decoding, found.drafts[:, 0], found.matched, strict=True):
            wanted = max(depth for least, depth in self._speculation.sizes.items() if matched >= least)
            count = max(min(wanted, room, running.count - len(running.request.drawn) - 1), 0)
            drafts[place], room = own[:count].tolist(), room - count
        return drafts

    def _call(
        self,
        present: Present,
        own: list[list[int]],
        pieces: list[list[int]],
        goes_on: np.ndarray,
        entries: np.ndarray,
    ) -> tuple[list[list[int]], list[int]]:
        """Feed the rows of those who decode and pieces of prompts.

        Returns what each place draws after its rows, and how many of its drafts that confirms.
        """
        fed, edges = _packed(own + pieces, self._rows if pieces else bucket(sum(map(len, own))))
        slots, ends = self.by_place(present, "slot", -1), np.maximum(edges[1:] - 1, 0)
        decodes = np.array([bool(rows) for rows in own])
        last = np.minimum(edges[: self.width, None] + np.arange(self._speculation.tokens), ends[: self.width, None])
        if pieces:
            last = np.where(decodes[:, None], last, ends[self.width :, None])
            slots = np.concatenate([np.where(decodes, slots, -1), np.where(decodes, -1, slots)])
            goes_on, entries = np.tile(goes_on, 2), np.concatenate([np.full(self.width, -1, np.int32), entries])
        drawn = np.zeros(self.width, np.int32)
        for place, running in present:
            drawn[place] = len(running.request.drawn)
        call = steps.Verification(
            fed=fed,
            edges=edges,
            slots=slots,
            has_initial_state=goes_on,
            entries=entries,
            start=self.by_place(present, "accepted", 0) + 1,
            rejected=self.by_place(present, "rejected", 0),
            last=last.astype(np.int32),
            seeds=self.by_place(present, "seed", 0, np.uint32),
            drawn=drawn,
        )
        stride = self.stride if pieces else 0
        *found, self.carry = steps.verified(self.config, self.weights, self.carry, call, self.sampling, stride)
        tokens, accepted = jax.device_get(found)
        return tokens.tolist(), accepted.tolist()


def _packed(pieces: list[list[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens of sequences in so many rows, and their edges."""
    edges = np.cumsum([0, *map(len, pieces)]).astype(np.int32)
    fed = np.zeros(rows, np.int32)
    fed[: edges[-1]] = [token for piece in pieces for token in piece]
    return fed, edges
