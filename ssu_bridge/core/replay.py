"""A state as a checkpoint with the tokens since, and the cursor that says which they are."""

import dataclasses
import functools
import math
import operator
import sys
import threading
from typing import Any, NamedTuple

import numpy as np

from ssu_bridge.core.arrays import framework_of

_lock = threading.Lock()


class ReplayState(NamedTuple):
    """A state that lags behind: a checkpoint, and rings of the tokens since, which ``update`` replays.

    It stands where a state of Mamba-2 stands, together with a ``ReplayCursor``. In JAX it is a pytree, as every named
    tuple is. Messages call the rings replay_x, replay_B and replay_dt.

    Attributes:
        checkpoint: (slots, nheads, headdim, dstate) float array, or a QuantizedState.
        x: (slots, nheads, length, headdim), of the dtype of the call's x; length is the cursor's window + tokens.
        B: (slots, ngroups, length, dstate), of the dtype of the call's B.
        dt: (slots, nheads, length) float32: the step sizes, with bias and softplus.
    """

    checkpoint: Any
    x: Any
    B: Any
    dt: Any


@dataclasses.dataclass(frozen=True, eq=False)
class ReplayCursor:
    """Where the tokens since the checkpoint are in the rings, for each slot; one serves all layers of a model.

    In JAX it is a pytree of ``start`` and ``pending``; ``window`` and ``tokens`` are static.

    Attributes:
        start: (slots,) int32, the row of the first pending token.
        pending: (slots,) int32, how many tokens are not in the checkpoint yet.
        window: the most tokens that may be pending.
        tokens: the most tokens of a sequence in one call, from 1 to ``window``.

    Raises:
        TypeError, ValueError: ``window`` or ``tokens`` is no such number.
    """

    start: Any
    pending: Any
    window: int
    tokens: int

    def __post_init__(self) -> None:
        for name in ("window", "tokens"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{name}: expected a Python int, got {type(number).__name__}")
        if not 1 <= self.tokens <= self.window:
            raise ValueError(
                f"tokens: expected a number from 1 to window = {self.window}, the most tokens of a sequence in one "
                f"call, got {self.tokens}"
            )
        if sys.modules.get("jax"):  # None where it is hidden
            with _lock:
                register_with_jax()

    @classmethod
    def empty(cls, slots: int, window: int, tokens: int, like: Any = None) -> "ReplayCursor":
        """Return a cursor with no pending tokens in any slot.

        Args:
            slots: of the states.
            window: the most tokens that may be pending. More of them make the checkpoint be written less often and the
                rings longer.
            tokens: the most tokens of a sequence in one call, from 1 to ``window``; 1 without speculation.
            like: an array of the framework and on the device that the cursor is for, such as the checkpoint. None:
                NumPy, which JAX takes as well.

        Raises:
            TypeError, ValueError: a number is none of those.
        """
        shape = (operator.index(slots),)
        return cls(zeros(shape, "int32", like, (0,)), zeros(shape, "int32", like, (0,)), window, tokens)

    @property
    def length(self) -> int:
        """The length of the rings."""
        return self.window + self.tokens


# Once in a process: JAX takes no second one.
@functools.cache
def register_with_jax() -> None:
    """Make a cursor a pytree of JAX."""
    import jax

    jax.tree_util.register_dataclass(ReplayCursor, ["start", "pending"], ["window", "tokens"])


def zeros(shape: tuple[int, ...], dtype: str, like: Any, axes: tuple[int | None, ...]) -> Any:
    """Return zeros of the framework and on the devices of an array.

    Args:
        shape, dtype: of the zeros.
        like: the array; None for NumPy.
        axes: for each axis of the zeros, the axis of ``like`` that it is sharded as; None where it is not.
    """
    framework = framework_of(like)
    if like is not None and framework is None:
        raise TypeError(f"like: expected a JAX, Torch or NumPy array, got {type(like).__name__}")
    if framework == "torch":
        return like.new_zeros(shape, dtype=getattr(sys.modules["torch"], dtype))
    if framework == "jax":
        return sys.modules["jax"].numpy.zeros(shape, dtype, device=_sharding(shape, like, axes))
    return np.zeros(shape, dtype)


def _sharding(shape: tuple[int, ...], like: Any, axes: tuple[int | None, ...]) -> Any:
    """Return where an array of JAX lies that is sharded along these axes of another; None where JAX decides it.

    An axis that does not divide evenly is not sharded.
    """
    jax = sys.modules["jax"]
    sharding = None if isinstance(like, jax.core.Tracer | jax.Ref) else like.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding if isinstance(sharding, jax.sharding.SingleDeviceSharding) else None
    spec = (*sharding.spec, *[None] * (like.ndim - len(sharding.spec)))
    places = [None if axis is None else spec[axis] for axis in axes]
    sizes = [_shards(place, sharding.mesh.shape) for place in places]
    even = (place if n % size == 0 else None for place, n, size in zip(places, shape, sizes, strict=True))
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*even))


def _shards(place: Any, mesh: Any) -> int:
    """Return over how many devices an axis is sharded."""
    return math.prod(mesh[name] for name in (place if isinstance(place, tuple) else (place,)) if name is not None)


def phase(xp: Any, cursor: ReplayCursor, slots: Any) -> tuple[Any, Any]:
    """Return the first pending row of some slots and how many are pending, whatever numbers the cursor has there.

    Args:
        xp: the namespace to compute in: ``numpy``, ``jax.numpy`` or ``torch``.
        cursor: of which only these slots are read.
        slots: an index of its arrays, all in range.
    """
    return cursor.start[slots] % cursor.length, xp.clip(cursor.pending[slots], 0, cursor.window)


def flushes(cursor: ReplayCursor, pending: Any, count: Any) -> Any:
    """Return whether a step of ``count`` tokens of its own writes the checkpoint of a slot with so many pending."""
    return (count > 0) & (pending + count > cursor.window)
