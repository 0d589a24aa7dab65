"""What the kernels of a replay state share: where the pending tokens are, and a checkpoint that is advanced by them.

A ring holds a sequence's last tokens. Those that are not in the checkpoint yet are pending; here they are counted back
from the newest, so that what happened after a token is a sum over those before it, without a difference of large
numbers.
"""

import triton
import triton.language as tl

from ssu_bridge.backends.triton.kernels.common import inside, load
from ssu_bridge.backends.triton.kernels.many_tokens import as_stored
from ssu_bridge.backends.triton.kernels.products import in_rows, in_turns, mixed, product, tile_of, unmixed
from ssu_bridge.backends.triton.kernels.rounding import larger, largest_of_rows, scale_of, widen


@triton.jit
def cursor_of(start, pending, slot, start_stride, pending_stride, WINDOW: tl.constexpr, RING: tl.constexpr):
    """Return a slot's first pending row and how many are pending, whatever the cursor holds; of a pad none."""
    live = slot >= 0
    first = tl.load(start + slot * start_stride, mask=live, other=0) % RING
    count = tl.load(pending + slot * pending_stride, mask=live, other=0)
    return tl.where(first < 0, first + RING, first), tl.minimum(tl.maximum(count, 0), WINDOW)


@triton.jit
def row_after(first, index, RING: tl.constexpr):
    """Return the row of a ring so many after the first, less than its length."""
    row = first + index
    return tl.where(row >= RING, row - RING, row)


@triton.jit
def pending_steps(dt, first, count, newest, K: tl.constexpr, RING: tl.constexpr):
    """Return of up to K pending tokens, newest first: their rows, which there are, their time steps, and the sums of
    those after each, which begin with ``newest``."""
    back = tl.arange(0, K)
    rows = row_after(first, count - 1 - back, RING)
    there = back < count
    d = tl.load(dt + rows, mask=there, other=0.0)
    # The token after it, once more: a scan gives sums that include the token itself.
    later = tl.load(dt + row_after(first, count - back, RING), mask=(back > 0) & (back <= count), other=0.0)
    return rows, there, d, tl.cumsum(tl.where(back == 0, newest, later), 0)


@triton.jit
def advance_checkpoint(
    state,
    scale,
    ring_x,
    ring_B,
    ring_dt,
    first,
    count,
    rate,
    seed,
    first_element,
    head,
    first_row,
    P: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PART: tl.constexpr,
    W: tl.constexpr,
    WARPS: tl.constexpr,
    STORED: tl.constexpr,
    B_PARTS: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Advance a block of rows of a head's checkpoint by the pending tokens, round it once and store it.

    It is read again, PART columns at a time, so that nobody has to keep it in registers until here. ``state``
    and ``scale`` point to the slot, the rings to the head's or group's rows; ``first_element`` is the number of the
    slot's first element.
    """
    # Other threads still read what this one is about to write.
    tl.debug_barrier()
    rows, there, d, later = pending_steps(ring_dt, first, count, 0.0, K, RING)
    weights = tl.where(there, d * tl.exp2(later * rate), 0.0)
    channels = first_row + tl.arange(0, BLOCK_P)
    channel_mask = inside(channels, P, BLOCK_P)
    xs = load(ring_x + rows[:, None] * P + channels[None, :], there[:, None] & channel_mask[None, :])
    added = tl.trans(xs * weights[:, None])
    decay = tl.exp2(tl.sum(d, 0) * rate)
    old = scale if scale is None else load(scale + head * P + channels, channel_mask)
    pending = (ring_B, rows, there, added, decay)
    scales = scale
    if scale is not None:
        largest = tl.zeros((BLOCK_P,), tl.float32)
        for column in range(0, N, PART):
            place = (head, first_row, column)
            new = _advanced(state, place, pending, old, P, N, BLOCK_P, PART, W, WARPS, STORED, B_PARTS)
            largest = larger(largest, largest_of_rows(new))
        scales = scale_of(largest, STORED)
        tl.store(scale + head * P + channels, scales, mask=channel_mask)
    for column in range(0, N, PART):
        place = (head, first_row, column)
        new = _advanced(state, place, pending, old, P, N, BLOCK_P, PART, W, WARPS, STORED, B_PARTS)
        stored = as_stored(
            unmixed(new, W), scales, head * P + channels, seed if seed is None else tl.load(seed),
            first_element + column, 0, 0, N, PART, STORED, ROUNDS,
        )  # fmt: skip
        tile, mask = tile_of(place, P, N, BLOCK_P, PART, WARPS, W)
        tl.store(state + tile, in_turns(stored, BLOCK_P, PART, WARPS, W), mask=mask)


@triton.jit
def _advanced(
    state,
    place,
    pending,
    scale,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PART: tl.constexpr,
    W: tl.constexpr,
    WARPS: tl.constexpr,
    STORED: tl.constexpr,
    B_PARTS: tl.constexpr,
):
    """Return PART columns of a block of rows of a checkpoint after the pending tokens, in the order of ``mixed``."""
    ring_B, rows, there, added, decay = pending
    tile, mask = tile_of(place, P, N, BLOCK_P, PART, WARPS, W)
    old = widen(mixed(in_rows(tl.load(state + tile, mask=mask, other=0), BLOCK_P, PART, WARPS, W), W), STORED)
    if scale is not None:
        old *= scale[:, None]
    columns = place[2] + tl.arange(0, PART)
    column_mask = inside(columns, N, PART)
    Bs = tl.load(ring_B + rows[:, None] * N + columns[None, :], mask=there[:, None] & column_mask[None, :], other=0.0)
    new = product(added, mixed(Bs, W), tl.zeros((BLOCK_P, PART), tl.float32), 3, B_PARTS)
    return tl.fma(old, decay, new)
