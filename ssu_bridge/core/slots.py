"""Where each sequence of a call reads and stores, from the values of its index tables. In NumPy.

``named_slots``, ``slots`` and ``read_slots`` take the namespace that they compute in, which may be ``jax.numpy`` too.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ssu_bridge.core.arguments import SLOT_TABLES
from ssu_bridge.core.problem import Problem


def slots(xp: Any, problem: Problem, indices: Any) -> Any:
    """Return the slots that indices name in a call, -1 for a padding index."""
    return named_slots(xp, indices, problem.slots, problem.options.pad_slot_id)


def named_slots(xp: Any, indices: Any, count: Any, pad_slot_id: int) -> Any:
    """Return which of so many slots indices name, -1 for a padding index."""
    valid = (indices >= 0) & (indices < count)
    if 0 <= pad_slot_id <= xp.iinfo(indices.dtype).max:  # else none of them is it
        valid = valid & (indices != pad_slot_id)
    return xp.where(valid, indices, -1)


def read_slots(xp: Any, problem: Problem, arrays: Mapping[str, Any]) -> Any:
    """Return the slot that each sequence starts from, -1 for a padding index; None where sequence i has slot i."""
    indices = arrays.get("state_batch_indices")
    if indices is None:
        return None
    if indices.ndim == 2 and indices.shape[1] == 0:  # no tokens, and no column to read a slot from
        return xp.full(indices.shape[:1], -1, indices.dtype)
    if indices.ndim == 2:
        sequences = xp.arange(indices.shape[0])
        accepted = arrays.get("num_accepted_tokens", xp.ones_like(sequences))
        indices = indices[sequences, xp.clip(accepted, 1, indices.shape[1]) - 1]
    return slots(xp, problem, indices)


class Routes(NamedTuple):
    """Where the tables of a call lead, whatever numbers are in them; -1 stands for no slot, entry or token.

    Attributes:
        starts: (b,), the first of each sequence's rows among all rows of tokens.
        lengths: (b,), how many rows it has.
        reads: (b,), the slot that it reads.
        loads: the same, but -1 where it starts from zeros whatever the slot holds.
        slots: (b, most tokens of a sequence), the slot that its state goes to after each token.
        entries: the same, of the intermediate states.
        steps: (most tokens of a sequence,), the step there.
        parents: (b, most tokens of a sequence), the token whose state each token continues.
    """

    starts: np.ndarray
    lengths: np.ndarray
    reads: np.ndarray
    loads: np.ndarray
    slots: np.ndarray
    entries: np.ndarray
    steps: np.ndarray
    parents: np.ndarray


def routes(problem: Problem, arrays: Mapping[str, Any]) -> Routes:
    """Return where each sequence of a call reads and stores.

    Args:
        problem: the description of the call.
        arrays: the call's NumPy arrays by name, of which only the shapes of the states and the tables are read.
    """
    b = problem.sequences
    sequences = np.arange(b)
    starts, lengths = _rows(problem, arrays)
    tokens = np.arange(max(lengths, default=0))
    valid = tokens < lengths[:, None]

    reads = read_slots(np, problem, arrays)
    reads = sequences if reads is None else reads

    if "dst_state_batch_indices" in problem.tables:
        table = slots(np, problem, arrays["dst_state_batch_indices"])
        stores_to = table[:, np.minimum(tokens, table.shape[1] - 1)]
        valid_slots = valid & (tokens < table.shape[1])
    else:
        final = slots(np, problem, arrays["dst_state_batch_indices"]) if "dst_state_batch_indices" in arrays else reads
        stores_to = np.repeat(final[:, None], len(tokens), axis=1)
        valid_slots = tokens == lengths[:, None] - 1
    if problem.options.disable_state_update:
        valid_slots = np.zeros_like(valid)

    count, steps = arrays["intermediate_states"].shape[:2] if "intermediate_states" in arrays else (0, 0)
    entry = arrays.get("intermediate_state_indices", reads).astype(np.int64)[:, None]
    stride = problem.options.intermediate_stride
    step = np.where((tokens + 1) % stride == 0, tokens // stride, -1)
    valid_entries = valid & (entry >= 0) & (entry < count) & (step >= 0) & (step < steps)

    stores = (reads >= 0)[:, None]  # a sequence without a slot to start from stores nothing anywhere
    stores_to = np.where(stores & valid_slots, stores_to, -1)
    entries = np.where(stores & valid_entries, entry, -1)
    loads = np.where(arrays.get("has_initial_state", True), reads, -1)
    return Routes(starts, lengths, reads, loads, stores_to, entries, step, _parents(arrays, starts, lengths))


def _parents(arrays: Mapping[str, Any], starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the token whose state each token continues, -1 for the state that the sequence starts from."""
    tokens = np.arange(max(lengths, default=0))
    chain = np.repeat(tokens[None] - 1, len(lengths), axis=0)
    for sequence, named in enumerate(_named_parents(arrays, starts, lengths)):
        earlier = (named >= 0) & (named < tokens[: len(named)])
        chain[sequence, : len(named)] = np.where(earlier, named, -1)
    return chain


def _named_parents(arrays: Mapping[str, Any], starts: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the numbers that parent_tokens has for each sequence; nothing without parent_tokens."""
    if "parent_tokens" in arrays:
        rows = arrays["parent_tokens"].astype(np.int64).reshape(-1)
        yield from (rows[start : start + length] for start, length in zip(starts, lengths, strict=True))


def _rows(problem: Problem, arrays: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    b = problem.sequences
    if problem.layout != "packed":
        return np.arange(b) * problem.tokens, np.full(b, problem.tokens)
    edges = np.clip(arrays["cu_seqlens"].astype(np.int64), 0, problem.tokens)
    return edges[:-1], np.clip(edges[1:] - edges[:-1], 0, problem.longest)


def require_valid(problem: Problem, arrays: Mapping[str, Any]) -> None:
    """Check that every index of a call is in range, and that no two sequences meet in a slot.

    Args:
        problem, arrays: as in :func:`routes`.

    Raises:
        ValueError: naming the argument, the place in it, what was expected and what is there.
    """
    pad = problem.options.pad_slot_id
    for name in SLOT_TABLES:
        _require(
            name, arrays, lambda i: (i == pad) | (i >= 0) & (i < problem.slots), f"{pad} or 0..{problem.slots - 1}"
        )
    if "num_accepted_tokens" in arrays:
        columns = arrays["state_batch_indices"].shape[1]
        _require("num_accepted_tokens", arrays, lambda n: (n >= 0) & (n <= columns), f"0..{columns}")
    _require("cu_seqlens", arrays, lambda c: (c >= 0) & (c <= problem.tokens), f"0..{problem.tokens}")
    _require("cu_seqlens", arrays, lambda c: np.diff(c, prepend=c[:1]) >= 0, "no less than the one before")
    plan = routes(problem, arrays)
    most = problem.longest
    _require("cu_seqlens", arrays, lambda c: np.diff(c, prepend=c[:1]) <= most, f"at most {most} tokens of a sequence")
    if "parent_tokens" in arrays:
        _require_parents(arrays, plan)
    window, length = problem.options.replay_window, problem.options.replay_window + problem.options.replay_tokens
    _require("replay_start", arrays, lambda row: (row >= 0) & (row < length), f"0..{length - 1}")
    _require("replay_pending", arrays, lambda count: (count >= 0) & (count <= window), f"0..{window}")
    if "dst_state_batch_indices" in problem.tables:
        _require_room("dst_state_batch_indices", arrays["dst_state_batch_indices"].shape[1], plan.lengths)
    if "intermediate_states" in arrays:
        entries, steps = arrays["intermediate_states"].shape[:2]
        _require("intermediate_state_indices", arrays, lambda i: (i >= 0) & (i < entries), f"0..{entries - 1}")
        if "intermediate_state_indices" not in arrays:
            _require_entries(entries, np.where(plan.lengths > 0, plan.reads, -1))
        _require_room("intermediate_states", steps, plan.lengths, problem.options.intermediate_stride)
    _require_apart("intermediate_states", "an entry", plan.entries, np.full_like(plan.reads, -1))
    _require_apart("state", "a slot", plan.slots, np.where(plan.lengths > 0, plan.loads, -1))  # an empty one reads none


def _require_parents(arrays: Mapping[str, Any], plan: Routes) -> None:
    for sequence, named in enumerate(_named_parents(arrays, plan.starts, plan.lengths)):
        for token in np.flatnonzero(named != plan.parents[sequence, : len(named)]):
            raise ValueError(
                f"parent_tokens: expected -1 or the number of a token before at token {token} of sequence {sequence}, "
                f"got {named[token]}"
            )


def _require(name: str, arrays: Mapping[str, Any], right: Any, expected: str) -> None:
    if name in arrays:
        values = arrays[name].astype(np.int64)
        for place in np.argwhere(~right(values)):
            raise ValueError(f"{name}: expected {expected} at {place.tolist()}, got {values[tuple(place)]}")


def _require_entries(count: int, reads: np.ndarray) -> None:
    for sequence in np.flatnonzero(reads >= count):
        raise ValueError(
            f"intermediate_states: expected an entry for each slot that a sequence reads, got {count} entries and slot "
            f"{reads[sequence]} read by sequence {sequence}"
        )


def _require_room(name: str, width: int, lengths: np.ndarray, stride: int = 1) -> None:
    each = "each token" if stride == 1 else f"every {stride} tokens"
    for sequence in np.flatnonzero(lengths // stride > width):
        raise ValueError(
            f"{name}: expected a place for {each} of a sequence, {lengths[sequence] // stride} of sequence {sequence}, "
            f"got {width}"
        )


def _require_apart(name: str, what: str, written: np.ndarray, reads: np.ndarray) -> None:
    """Raise if two sequences write one place, or one writes what another reads."""
    writer: dict[int, int] = {}
    for sequence, places in enumerate(written):
        for place in {*places[places >= 0].tolist()}:
            if writer.setdefault(place, sequence) != sequence:
                raise ValueError(
                    f"{name}: expected {what} to be written by one sequence, got {place} written by sequences "
                    f"{writer[place]} and {sequence}"
                )
    for sequence, place in enumerate(reads.tolist()):
        if writer.get(place, sequence) != sequence:
            raise ValueError(
                f"{name}: expected {what} that a sequence reads not to be written by another, got {place} read by "
                f"sequence {sequence} and written by sequence {writer[place]}"
            )
