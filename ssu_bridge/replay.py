"""What is done with a ``ReplayState`` and its cursor between calls of ``update``."""

from typing import Any

import numpy as np

from ssu_bridge.core.arguments import FLOATS, INDICES
from ssu_bridge.core.arrays import framework_of
from ssu_bridge.core.quantized import QuantizedState, dtype_name, namespace
from ssu_bridge.core.replay import ReplayCursor, ReplayState, flushes, phase, zeros
from ssu_bridge.core.slots import named_slots


def advance_replay(
    cursor: ReplayCursor,
    slots: Any,
    *,
    tokens: Any = None,
    cu_seqlens: Any = None,
    num_accepted: Any = None,
    pad_slot_id: int = -1,
) -> ReplayCursor:
    """Return the cursor after a step of a model: call it once, after all layers and before any other call.

    It takes the slots and lengths of that step, and leaves all other slots alone.

    Args:
        cursor: the one that the step's calls of ``update`` had.
        slots: (b,), the step's ``state_batch_indices``; None: sequence i has slot i, and each slot a sequence.
        tokens: how many tokens each sequence had in the step: a number, or (b,) integers.
        cu_seqlens: (b + 1,), those of a packed step, instead of ``tokens``.
        num_accepted: (b,), how many of a sequence's tokens stay, from its first on; the others were drafts that were
            rejected, and the next step overwrites them. With a verified token that follows the drafts it is vLLM's
            count, drafts that were accepted and 1. None: all stay.
        pad_slot_id: as in ``update``.

    Returns:
        The cursor. Torch, NumPy: the object that was passed, its arrays updated in place. JAX: a new one.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was changed.
    """
    cursor, xp, cast = _with_namespace(cursor, slots, tokens, cu_seqlens, num_accepted)
    if (tokens is None) == (cu_seqlens is None):
        raise TypeError("tokens: expected either tokens or cu_seqlens, the lengths of the step's sequences")
    places, valid = _places(xp, cursor, slots, pad_slot_id)
    if not cursor.start.shape[0]:  # nothing is read of no slots
        return cursor
    start, pending = phase(xp, cursor, places)
    if cu_seqlens is not None:
        edges = xp.clip(_numbers("cu_seqlens", cu_seqlens, pending, 1), 0, None)
        count = xp.clip(edges[1:] - edges[:-1], 0, cursor.tokens)
    else:
        count = _counts(xp, "tokens", tokens, pending, cursor.tokens)
    stays = count if num_accepted is None else _counts(xp, "num_accepted", num_accepted, pending, cursor.tokens)
    count = cast(count, "int32")
    stays = xp.minimum(cast(stays, "int32"), count)
    flushed = flushes(cursor, pending, count)
    start = xp.where(flushed, (start + pending) % cursor.length, start)
    pending = xp.where(flushed, stays, pending + stays)
    return _stored(xp, cursor, places, valid & (count > 0), start, pending)


def reset_replay(cursor: ReplayCursor, slots: Any, *, pad_slot_id: int = -1) -> ReplayCursor:
    """Return the cursor with no pending tokens in some slots: those of new sequences, whose states are checkpoints.

    Args:
        cursor: to change.
        slots: (b,) integers, those of the sequences; None: all.
        pad_slot_id: as in ``update``.

    Returns:
        The cursor. Torch, NumPy: the object that was passed, its arrays updated in place. JAX: a new one.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was changed.
    """
    cursor, xp, _ = _with_namespace(cursor, slots)
    places, valid = _places(xp, cursor, slots, pad_slot_id)
    if not cursor.start.shape[0]:
        return cursor
    zero = xp.zeros_like(cursor.start[places])
    return _stored(xp, cursor, places, valid, zero, zero)


def materialize(
    replay_state: ReplayState, cursor: ReplayCursor, slots: Any, A: Any, *, tokens: Any = None, pad_slot_id: int = -1
) -> Any:
    """Return the states of some slots after their pending tokens, in float32; nothing is changed.

    Args:
        replay_state: of one layer.
        cursor: its cursor.
        slots: (b,) integers; None: all.
        A: (nheads,), or a view of it that repeats along headdim and dstate, as in ``update``.
        tokens: a number or (b,) integers: the state after so many of the pending tokens. None: after all.
        pad_slot_id: as in ``update``; the state of a padding index is zeros.

    Returns:
        (b, nheads, headdim, dstate) float32.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    cursor, xp, cast = _with_namespace(cursor, slots, tokens, *_require_rings(replay_state))
    _require_own(replay_state, cursor)
    places, valid = _places(xp, cursor, slots, pad_slot_id)
    if not cursor.start.shape[0]:
        shape = (valid.shape[0], *replay_state.x.shape[1::2], replay_state.B.shape[3])
        return zeros(shape, "float32", replay_state.dt, (None,) * 4)
    start, pending = phase(xp, cursor, places)
    if tokens is not None:
        pending = xp.minimum(pending, cast(_counts(xp, "tokens", tokens, pending, cursor.window), "int32"))
    states = _checkpoints(replay_state.checkpoint, places, cast)
    x, B, dt = (_pending_rows(xp, cast, ring, cursor, places, start) for ring in replay_state[1:])
    heads, groups = x.shape[2], B.shape[2]
    decays = cast(_tied(A, heads), "float32").reshape(1, heads)
    for number in range(cursor.window):
        steps = dt[:, number]
        added = (steps[..., None] * x[:, number]).reshape(-1, groups, heads // groups * x.shape[-1], 1)
        added = (added * B[:, number, :, None]).reshape(states.shape)
        after = states * xp.exp(decays * steps)[..., None, None] + added
        states = xp.where((number < pending)[:, None, None, None], after, states)
    return xp.where(valid[:, None, None, None], states, xp.zeros_like(states))


def to_replay(
    state: Any, window: int, tokens: int, ngroups: int, x_dtype: Any = "float32", B_dtype: Any = "float32"
) -> ReplayState:
    """Return a ReplayState whose checkpoint is a state, with empty rings for ``ReplayCursor.empty``.

    Args:
        state: (slots, nheads, headdim, dstate) float array, or a QuantizedState; it becomes the checkpoint as it is.
        window, tokens: those of the cursor.
        ngroups: of B, a divisor of nheads.
        x_dtype, B_dtype: those of the x and B that ``update`` gets, by name or as a dtype of any framework.

    Returns:
        The state, with rings on its device. JAX: sharded as the state is, groups as heads where none is divided.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    values = state.values if isinstance(state, QuantizedState) else state
    if framework_of(values) is None:
        raise TypeError(f"state: expected a JAX, Torch or NumPy array or a QuantizedState, got {type(state).__name__}")
    if len(values.shape) != 4:
        raise ValueError(f"state: expected shape (slots, nheads, headdim, dstate), got {tuple(values.shape)}")
    slots, heads, headdim, dstate = values.shape
    if isinstance(ngroups, bool) or not isinstance(ngroups, int) or ngroups < 1 or heads % ngroups:
        raise ValueError(f"ngroups: expected a divisor of nheads = {heads}, got {ngroups!r}")
    length = ReplayCursor(None, None, window, tokens).length
    return ReplayState(
        state,
        zeros((slots, heads, length, headdim), _float(x_dtype, "x_dtype"), values, (0, 1, None, 2)),
        zeros((slots, ngroups, length, dstate), _float(B_dtype, "B_dtype"), values, (0, 1, None, None)),
        zeros((slots, heads, length), "float32", values, (0, 1, None)),
    )


def _with_namespace(cursor: Any, *others: Any) -> tuple[ReplayCursor, Any, Any]:
    """Return a cursor, the module that computes with its arrays, and what casts an array to a dtype by name.

    A cursor of NumPy arrays becomes one of JAX alongside arrays of that.

    Raises:
        TypeError, ValueError: it is no cursor.
    """
    if not isinstance(cursor, ReplayCursor):
        raise TypeError(f"cursor: expected a ReplayCursor, got {type(cursor).__name__}")
    framework, shape = framework_of(cursor.start), tuple(getattr(cursor.start, "shape", ()))
    for name, array in (("start", cursor.start), ("pending", cursor.pending)):
        if framework is None or framework_of(array) != framework:
            raise TypeError(f"cursor.{name}: expected an array of one framework with start, got {type(array).__name__}")
        dtype = str(array.dtype).removeprefix("torch.")
        if len(shape) != 1 or tuple(array.shape) != shape or dtype != "int32":
            raise ValueError(
                f"cursor.{name}: expected shape (slots,) and int32, got {dtype} of shape {tuple(array.shape)}"
            )
    of_jax = next((array for array in others if framework == "numpy" and framework_of(array) == "jax"), None)
    xp, cast = namespace(cursor.start if of_jax is None else of_jax)
    if of_jax is not None:
        start, pending = xp.asarray(cursor.start), xp.asarray(cursor.pending)
        cursor = ReplayCursor(start, pending, cursor.window, cursor.tokens)
    return cursor, xp, cast


def _places(xp: Any, cursor: ReplayCursor, slots: Any, pad_slot_id: int) -> tuple[Any, Any]:
    """Return an index of the cursor's arrays, with an entry for each sequence, and whether that is its slot."""
    if slots is None:
        return slice(None), cursor.start == cursor.start
    named = named_slots(xp, _numbers("slots", slots, cursor.start), cursor.start.shape[0], pad_slot_id)
    return xp.where(named >= 0, named, 0), named >= 0


def _numbers(name: str, array: Any, like: Any, more: int | None = None) -> Any:
    """Return integers as an array of the framework of another, which has one less or just as many, if that is known.

    Raises:
        TypeError, ValueError: they are none.
    """
    framework = framework_of(like)
    if framework_of(array) not in (framework, "numpy" if framework == "jax" else framework):
        raise TypeError(f"{name}: expected a {framework} array, as the cursor has, got {type(array).__name__}")
    dtype, shape = str(array.dtype).removeprefix("torch."), tuple(array.shape)
    if dtype not in INDICES:
        raise ValueError(f"{name}: expected dtype {' or '.join(INDICES)}, got {dtype}")
    if len(shape) != 1 or (more is not None and shape[0] != like.shape[0] + more):
        expected = "(sequences,)" if more is None else f"({like.shape[0] + more},), for {like.shape[0]} sequences"
        raise ValueError(f"{name}: expected shape {expected}, got {shape}")
    if framework == "jax" and isinstance(array, np.ndarray):  # of which JAX would keep the low 32 bits
        narrow = np.iinfo(np.int32)
        return np.clip(array, narrow.min, narrow.max).astype(np.int32)
    return array


def _counts(xp: Any, name: str, counts: Any, like: Any, most: int) -> Any:
    """Return a count for each sequence from 0 to ``most``; a Python number is one for all.

    Raises:
        TypeError, ValueError: they are none.
    """
    if isinstance(counts, int) and not isinstance(counts, bool):
        if not 0 <= counts <= most:
            raise ValueError(f"{name}: expected a number from 0 to {most}, got {counts}")
        return xp.full_like(like, counts)
    return xp.clip(_numbers(name, counts, like, 0), 0, most)


def _stored(xp: Any, cursor: ReplayCursor, places: Any, valid: Any, start: Any, pending: Any) -> ReplayCursor:
    """Return the cursor with new numbers for the slots of valid sequences: the same, but of JAX."""
    start, pending = (_put(xp, *pair, places, valid) for pair in ((cursor.start, start), (cursor.pending, pending)))
    if framework_of(cursor.start) == "jax":
        return ReplayCursor(start, pending, cursor.window, cursor.tokens)
    cursor.start[...], cursor.pending[...] = start, pending
    return cursor


def _put(xp: Any, array: Any, values: Any, places: Any, valid: Any) -> Any:
    """Return an array with valid values in their places; others are put past the end, and dropped."""
    if isinstance(places, slice):
        return xp.where(valid, values, array)
    index = xp.where(valid, places, array.shape[0])
    if framework_of(array) == "jax":
        return array.at[index].set(values, mode="drop")
    longer = xp.concatenate([array, array[:1]])
    longer[index] = values
    return longer[:-1]


def _require_rings(replay_state: Any) -> tuple[Any, ...]:
    """Return the rings of a ReplayState."""
    if not isinstance(replay_state, ReplayState):
        raise TypeError(f"replay_state: expected a ReplayState, got {type(replay_state).__name__}")
    return replay_state[1:]


def _require_own(replay_state: ReplayState, cursor: ReplayCursor) -> None:
    """Check that a state is one that a cursor is for."""
    slots, length = cursor.start.shape[0], cursor.length
    for name, shape in ((name, getattr(replay_state, name).shape) for name in ("x", "B", "dt")):
        if shape[0] != slots or shape[2] != length:
            raise ValueError(
                f"cursor: expected one of {shape[0]} slots and a window + tokens of {shape[2]}, as the state's {name} "
                f"has, got {slots} slots and {cursor.window} + {cursor.tokens}: it belongs to another state"
            )


def _checkpoints(checkpoint: Any, places: Any, cast: Any) -> Any:
    """Return the checkpoints of some slots in float32."""
    if isinstance(checkpoint, QuantizedState):
        return QuantizedState(*(array[places] for array in checkpoint)).dequantize()
    return cast(checkpoint[places], "float32")


def _pending_rows(xp: Any, cast: Any, ring: Any, cursor: ReplayCursor, places: Any, start: Any) -> Any:
    """Return the rows of a ring from the first pending one on, as many as the window: (b, window, ...) float32."""

    def numbers(count: int) -> Any:
        return xp.arange(count, dtype=start.dtype, device=start.device)

    index = numbers(start.shape[0]) if isinstance(places, slice) else places
    rows = (start[:, None] + numbers(cursor.window)[None]) % cursor.length
    # An index on either side of an axis puts its own axes first.
    return cast(ring[index[:, None], :, rows], "float32")


def _tied(A: Any, heads: int) -> Any:
    """Return A as one number a head.

    Raises:
        ValueError: it is not.
    """
    if tuple(A.shape) == (heads,):
        return A
    strides = A.stride() if hasattr(A, "stride") else getattr(A, "strides", None)
    repeats = strides and all(n == 1 or not step for n, step in zip(A.shape[1:], strides[1:], strict=True))
    if len(A.shape) == 3 and A.shape[0] == heads and repeats:
        return A[:, 0, 0]
    raise ValueError(f"A: expected one number a head, of shape ({heads},), got shape {tuple(A.shape)}")


def _float(dtype: Any, name: str) -> str:
    """Return the name of a float dtype, which may be one of any framework."""
    spelt = dtype_name(dtype)
    if spelt not in FLOATS:
        raise ValueError(f"{name}: expected {', '.join(FLOATS)}, got {spelt}")
    return spelt
