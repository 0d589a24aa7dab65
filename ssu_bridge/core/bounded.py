"""A dict of bounded size."""

from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Bounded(dict[K, V], Generic[K, V]):
    """A dict that forgets all of its entries before it holds more than ``size``.

    What varies without end must not fill the memory. Its lookups are those of a dict, which are in every call.
    """

    def __init__(self, size: int):
        super().__init__()
        self._size = size

    def __setitem__(self, key: K, value: V) -> None:
        if len(self) >= self._size and key not in self:
            self.clear()
        super().__setitem__(key, value)
