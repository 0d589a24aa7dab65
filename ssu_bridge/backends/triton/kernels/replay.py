"""What the kernels of a replay state share: where the pending tokens are, and a checkpoint that is advanced by them.

A ring holds a sequence's last tokens. Those that are not in the checkpoint yet are pending; here they are counted back
from the newest, so that what happened after a token is a sum over those before it, without a difference of large
numbers.
"""

import triton
import triton.language as tl

from ssu_bridge.backends.triton.kernels.common import INTERPRETED, LOG2_E, inside, load
from ssu_bridge.backends.triton.kernels.products import in_rows, in_turns, mixed, product, tile_of, unmixed
from ssu_bridge.backends.triton.kernels.rounding import as_stored, row_scale, widen


@triton.jit
def cursor_of(start, pending, slot, start_stride, pending_stride, WINDOW: tl.constexpr, RING: tl.constexpr):
    """Return a slot's first pending row and how many are pending, whatever the cursor holds; of a pad none."""
    first, count = read_cursor(start, pending, slot, start_stride, pending_stride)
    return limited(first, count, WINDOW, RING)


@triton.jit
def read_cursor(start, pending, slot, start_stride, pending_stride):
    """Return what a cursor holds for a slot, of a pad zeros."""
    live = slot >= 0
    first = tl.load(start + slot * start_stride, mask=live, other=0)
    return first, tl.load(pending + slot * pending_stride, mask=live, other=0)


@triton.jit
def limited(first, count, WINDOW: tl.constexpr, RING: tl.constexpr):
    """Return a first row and a number of rows that a ring has."""
    first = first % RING
    return tl.where(first < 0, first + RING, first), tl.minimum(tl.maximum(count, 0), WINDOW)


@triton.jit
def row_after(first, index, RING: tl.constexpr):
    """Return the row of a ring so many after the first, less than its length."""
    row = first + index
    return tl.where(row >= RING, row - RING, row)


@triton.jit
def pending_steps(dt, first, count, newest, K: tl.constexpr, RING: tl.constexpr):
    """Return the time steps of up to K pending tokens, newest first, and the sum of those after each.

    The sums begin with ``newest``, that of a token after all of them.
    """
    back = tl.arange(0, K)
    d = tl.load(dt + row_after(first, count - 1 - back, RING), mask=back < count, other=0.0)
    # The token after it, once more: a scan gives sums that include the token itself.
    later = tl.load(dt + row_after(first, count - back, RING), mask=(back > 0) & (back <= count), other=0.0)
    return d, tl.cumsum(tl.where(back == 0, newest, later), 0)


@triton.jit
def advance_checkpoints(
    state,
    scale,
    replay_x,
    ring_B,
    replay_dt,
    A,
    cursor,
    place,
    seed,
    first_element,
    P: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    RING: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WARPS: tl.constexpr,
    W: tl.constexpr,
    STORED: tl.constexpr,
    B_PARTS: tl.constexpr,
    ROUNDS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Advance a block of rows of some heads' checkpoints by the pending tokens, round them once and store them.

    Pointers are those of the slot, that of B the group's; ``cursor`` and ``place`` are the first pending row and how
    many are pending, and the first head and row; ``first_element`` is the number of the slot's first element.
    """
    # Other threads may still read what this one is about to write.
    tl.debug_barrier()
    first, count = cursor
    first_head, first_row = place
    ROWS: tl.constexpr = 16 * WARPS
    blocks: tl.constexpr = BLOCK_P // ROWS
    back = tl.arange(0, K)
    there = back < count
    rows = row_after(first, count - 1 - back, RING)
    columns = tl.arange(0, BLOCK_N)
    B_mask = there[:, None] & inside(columns, N, BLOCK_N)[None, :]
    Bs = mixed(tl.load(ring_B + rows[:, None] * N + columns[None, :], mask=B_mask, other=0.0), W)
    for i in tl.range(0, HEADS * blocks, num_stages=STAGES):
        head = first_head + i // blocks
        block = (head, first_row + i % blocks * ROWS, 0)
        channels = block[1] + tl.arange(0, ROWS)
        channel_mask = inside(channels, P, ROWS)
        tile, mask = tile_of(block, P, N, ROWS, BLOCK_N, WARPS, W)
        old = tl.load(state + tile, mask=mask, other=0)
        ring_x = replay_x + head.to(tl.int64) * (RING * P)
        xs = load(ring_x + rows[:, None] * P + channels[None, :], there[:, None] & channel_mask[None, :])
        rate = tl.load(A + head).to(tl.float32) * LOG2_E
        advance(
            old, scale, xs, Bs, rate, replay_dt, cursor, block, (state + tile, mask), seed, first_element, P, N,
            K, RING, ROWS, BLOCK_N, WARPS, W, STORED, B_PARTS, ROUNDS,
        )  # fmt: skip


@triton.jit
def advance(
    old,
    scale,
    xs,
    Bs,
    rate,
    replay_dt,
    cursor,
    block,
    target,
    seed,
    first_element,
    P: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    RING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WARPS: tl.constexpr,
    W: tl.constexpr,
    STORED: tl.constexpr,
    B_PARTS: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Advance rows of a head's checkpoint, as they were loaded from a tile, by the pending tokens and store them."""
    first, count = cursor
    head, first_row, _ = block
    pointers, mask = target
    channels = first_row + tl.arange(0, ROWS)
    channel_mask = inside(channels, P, ROWS)
    old = mixed(in_rows(_widened(old, STORED), ROWS, BLOCK_N, WARPS, W), W)
    scales = scale
    if scale is not None:
        old *= load(scale + head * P + channels, channel_mask)[:, None]
    d, later = pending_steps(replay_dt + head * RING, first, count, 0.0, K, RING)
    weights = tl.where(tl.arange(0, K) < count, d * tl.exp2(later * rate), 0.0)
    zeros = tl.zeros((ROWS, BLOCK_N), tl.float32)
    added = product(tl.trans(xs * weights[:, None]), Bs, zeros, 3, B_PARTS)
    new = tl.fma(old, tl.exp2(tl.sum(d, 0) * rate), added)
    if scale is not None:
        scales = row_scale(new, STORED)
        tl.store(scale + head * P + channels, scales, mask=channel_mask)
    stored = as_stored(
        unmixed(new, W), scales, head * P + channels, seed if seed is None else tl.load(seed), first_element, 0, 0,
        N, BLOCK_N, STORED, ROUNDS,
    )  # fmt: skip
    tl.store(pointers, in_turns(stored, ROWS, BLOCK_N, WARPS, W), mask=mask)


@triton.jit
def _widened(loaded, STORED: tl.constexpr):
    """Convert to float32, bfloat16 by other instructions than elsewhere: what those gave need not be kept for here."""
    if INTERPRETED or STORED != "bfloat16":
        return widen(loaded, STORED)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0, 0x1044; prmt.b32 $1, $2, 0, 0x3244;", "=&r,=r,r", [loaded], tl.int32, True, 2
        ).to(tl.float32, bitcast=True)
