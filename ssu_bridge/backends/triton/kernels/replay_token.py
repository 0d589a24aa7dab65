"""A step of one new token against a replay state: row products of the checkpoint, and of the pending tokens' rows.

With the decay a to the new token, and what has happened to each pending token since, w,

    y = a (checkpoint . C) + sum over j of w[j] d[j] (B[j] . C) x[j] + d (B . C) x

A program does this for a block of rows (headdim) of one head of one sequence. The checkpoint is only read, but by the
step for which the ring has no room.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ssu_bridge.backends.triton.kernels.common import (
    LOG2_E,
    by_row,
    gated_output,
    inside,
    load,
    slot_of,
    time_step,
)
from ssu_bridge.backends.triton.kernels.many_tokens import at_first, tokens_of
from ssu_bridge.backends.triton.kernels.replay import advance_checkpoint, cursor_of, pending_steps, row_after
from ssu_bridge.backends.triton.kernels.rounding import widen


@triton.jit
def replay_token(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    state_batch_indices,
    cu_seqlens,
    state_scale,
    rand_seed,
    replay_x,
    replay_B,
    replay_dt,
    replay_start,
    replay_pending,
    out,
    slots,
    tokens,
    state_stride,
    x_stride,
    dt_stride,
    B_stride,
    C_stride,
    z_stride,
    state_batch_indices_stride,
    cu_seqlens_stride,
    state_scale_stride,
    replay_x_stride,
    replay_B_stride,
    replay_dt_stride,
    replay_start_stride,
    replay_pending_stride,
    out_stride,
    x_token_stride,
    dt_token_stride,
    B_token_stride,
    C_token_stride,
    z_token_stride,
    out_token_stride,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    TIED_D: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PAD: tl.constexpr,
    STORED: tl.constexpr,
    ROUNDS: tl.constexpr,
    WINDOW: tl.constexpr,
    RING: tl.constexpr,
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    RING_COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    WARPS: tl.constexpr,
    W: tl.constexpr,
    B_PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Write ``out``, the token's row of the rings, and if it must be the checkpoint. An absent array is None.

    WINDOW is the most pending tokens, RING the length of the rings, K a power of two of at least WINDOW. The
    checkpoint is read COLUMNS at a time, a ring RING_COLUMNS. The grid, strides and OVERLAP are those of the other
    kernels.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    sequence = (program // (H * blocks)).to(tl.int64)
    head = program // blocks % H
    first_row = program % blocks * BLOCK_P
    rows = first_row + tl.arange(0, BLOCK_P)
    row_mask = inside(rows, P, BLOCK_P)
    channels = head * P + rows

    begin, length = tokens_of(cu_seqlens, cu_seqlens_stride, sequence, tokens)
    if length <= 0:
        return
    slot = slot_of(state_batch_indices, state_batch_indices_stride, sequence, slots, PAD)
    live = slot >= 0
    first, count = cursor_of(
        replay_start, replay_pending, slot, replay_start_stride, replay_pending_stride, WINDOW, RING
    )
    state += slot * state_stride
    scale = state_scale if state_scale is None else state_scale + slot * state_scale_stride
    group = head // (H // G)
    x = at_first(x, x_stride, x_token_stride, sequence, begin) + channels
    B = at_first(B, B_stride, B_token_stride, sequence, begin) + group * N
    C = at_first(C, C_stride, C_token_stride, sequence, begin) + group * N
    new_x = tl.load(x, mask=row_mask)
    raw_d = tl.load(at_first(dt, dt_stride, dt_token_stride, sequence, begin) + head).to(tl.float32)
    bias = dt_bias if dt_bias is None else tl.load(dt_bias + head).to(tl.float32)
    d = time_step(raw_d, bias, SOFTPLUS)
    rate = tl.load(A + head).to(tl.float32) * LOG2_E

    ring_x = replay_x + slot * replay_x_stride + head.to(tl.int64) * (RING * P)
    ring_B = replay_B + slot * replay_B_stride + group.to(tl.int64) * (RING * N)
    ring_dt = replay_dt + slot * replay_dt_stride + head * RING
    row = row_after(first, count, RING)
    y = tl.zeros((BLOCK_P,), tl.float32)
    if live:
        rings = (ring_x, ring_B, ring_dt, first, count)
        y = _replayed(
            state, scale,
            C, rings, d, rate, head, rows, row_mask, P, N, K, RING, BLOCK_P, COLUMNS, RING_COLUMNS, STORED,
        )  # fmt: skip
    xs = new_x.to(tl.float32)
    new_dots = tl.zeros((COLUMNS,), tl.float32)
    for column in tl.static_range(0, N, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        column_mask = inside(columns, N, COLUMNS)
        new_dots = tl.fma(load(B + columns, column_mask), load(C + columns, column_mask), new_dots)
    y += xs * (d * tl.sum(new_dots, 0))
    skip = D if D is None else by_row(D, head, rows, row_mask, P, TIED_D)
    gate = z
    if z is not None:
        gate = load(at_first(z, z_stride, z_token_stride, sequence, begin) + channels, row_mask)
    y = gated_output(y, xs, skip, gate)
    out = at_first(out, out_stride, out_token_stride, sequence, begin)
    tl.store(out + channels, y.to(out.dtype.element_ty), mask=row_mask)

    tl.store(ring_x + row * P + rows, new_x, mask=row_mask & live)
    is_first = live & (first_row == 0)
    tl.store(ring_dt + row, d, mask=is_first)
    if is_first & (head % (H // G) == 0):
        all_columns = tl.arange(0, BLOCK_N)
        columns_mask = inside(all_columns, N, BLOCK_N)
        new_B = tl.load(B + all_columns, mask=columns_mask, other=0)
        tl.store(ring_B + row * N + all_columns, new_B, mask=columns_mask)
    if live & (count + 1 > WINDOW):
        advance_checkpoint(
            state, scale,
            ring_x, ring_B, ring_dt, first, count, rate, rand_seed, slot * (H * P * N), head, first_row,
            P, N, K, RING, BLOCK_P, PART, W, WARPS, STORED, B_PARTS, ROUNDS,
        )  # fmt: skip


@triton.jit
def _replayed(
    state,
    scale,
    C,
    rings,
    d,
    rate,
    head,
    rows,
    row_mask,
    P: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_P: tl.constexpr,
    COLUMNS: tl.constexpr,
    RING_COLUMNS: tl.constexpr,
    STORED: tl.constexpr,
):
    """Return what the checkpoint and the pending tokens contribute to the output of a new token with time step d."""
    ring_x, ring_B, ring_dt, first, count = rings
    # The last of several loads decides in which layout what they have in common is computed.
    columns = tl.arange(0, COLUMNS)[None, :]
    Cs = ()
    for column in tl.static_range(0, N, COLUMNS):
        Cs += (load(C + column + columns, inside(column + columns, N, COLUMNS)),)
    tile = state + (head.to(tl.int64) * (P * N) + rows[:, None] * N)
    olds = ()
    for column in tl.static_range(0, N, COLUMNS):
        mask = row_mask[:, None] & inside(column + columns, N, COLUMNS)
        olds += (tl.load(tile + column + columns, mask=mask, other=0),)
    ring_columns = tl.arange(0, RING_COLUMNS)[None, :]
    ring_Cs = ()
    for column in tl.static_range(0, N, RING_COLUMNS):
        ring_Cs += (load(C + column + ring_columns, inside(column + ring_columns, N, RING_COLUMNS)),)
    tl.debug_barrier()

    ring_rows, there, old_d, later = pending_steps(ring_dt, first, count, d, K, RING)
    old_Bs = ()
    for column in tl.static_range(0, N, RING_COLUMNS):
        mask = there[:, None] & inside(column + ring_columns, N, RING_COLUMNS)
        old_Bs += (tl.load(ring_B + ring_rows[:, None] * N + column + ring_columns, mask=mask, other=0.0),)
    old_x = tl.load(ring_x + ring_rows[:, None] * P + rows[None, :], mask=there[:, None] & row_mask[None, :], other=0.0)

    dots = tl.zeros((K, RING_COLUMNS), tl.float32)
    for i in tl.static_range(len(old_Bs)):
        dots = tl.fma(old_Bs[i].to(tl.float32), tl.broadcast_to(ring_Cs[i], dots.shape), dots)
    weights = tl.where(there, tl.sum(dots, 1) * (old_d * tl.exp2(later * rate)), 0.0)

    products = tl.zeros((BLOCK_P, COLUMNS), tl.float32)
    for i in tl.static_range(len(olds)):
        products = tl.fma(widen(olds[i], STORED), tl.broadcast_to(Cs[i], products.shape), products)
    y = tl.sum(products, 1) * tl.exp2((tl.sum(old_d, 0) + d) * rate)
    if scale is not None:
        y *= load(scale + head * P + rows, row_mask)
    return y + tl.sum(old_x.to(tl.float32) * weights[:, None], 0)
