"""Which prompts' states are kept, and where: a prompt that begins like an earlier one starts from those."""

import collections
from typing import NamedTuple


class Place(NamedTuple):
    """Where a state is kept: an entry of the buffers, and a step there."""

    entry: int
    step: int


class PrefixCache:
    """Places of the states after prefixes of prompts, the least recently used given up first.

    Args:
        entries: of the buffers; each takes what one piece of a prompt leaves.
        stride: a state is kept after each so many tokens of a prompt.
    """

    def __init__(self, entries: int, stride: int):
        self.stride = stride
        self._places: dict[tuple[int, ...], Place] = {}
        self._prefixes: collections.OrderedDict[int, list[tuple[int, ...]]] = collections.OrderedDict(
            (entry, []) for entry in range(entries)
        )

    def longest(self, prompt: tuple[int, ...]) -> tuple[int, Place] | None:
        """Return the length of the longest prefix of a prompt that is kept, and its place; a token is left to read."""
        for length in range((len(prompt) - 1) // self.stride * self.stride, 0, -self.stride):
            place = self._places.get(prompt[:length])
            if place is not None:
                self._prefixes.move_to_end(place.entry)
                return length, place
        return None

    def keep(self, prompt: tuple[int, ...], start: int, end: int) -> int:
        """Return the entry for the states of a piece that begins at a multiple of the stride; -1 if all are kept."""
        prefixes = [prompt[:length] for length in range(start + self.stride, end + 1, self.stride)]
        if all(prefix in self._places for prefix in prefixes):
            return -1
        entry, given_up = next(iter(self._prefixes.items()))
        for prefix in given_up:
            place = self._places.get(prefix)
            if place is not None and place.entry == entry:  # it may be kept elsewhere by now
                del self._places[prefix]
        self._prefixes[entry] = prefixes
        self._prefixes.move_to_end(entry)
        self._places |= {prefix: Place(entry, step) for step, prefix in enumerate(prefixes)}
        return entry
