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
    pairs_to_float32,
    prefetch_elements,
    slot_of,
    softplus,
)
from ssu_bridge.backends.triton.kernels.many_tokens import at_first, tokens_of
from ssu_bridge.backends.triton.kernels.products import groups_of, mixed, tile_of
from ssu_bridge.backends.triton.kernels.replay import (
    advance,
    advance_checkpoints,
    limited,
    pending_steps,
    read_cursor,
    row_after,
)
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
    WARPS: tl.constexpr,
    W: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
    FLUSH_STAGES: tl.constexpr,
    TOGETHER: tl.constexpr,
    RING_TOGETHER: tl.constexpr,
    B_PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
    EARLY: tl.constexpr,
    ONE_PASS: tl.constexpr,
    SWAPS: tl.constexpr,
):
    """Write ``out``, the token's row of the rings, and if it must be the checkpoint. An absent array is None.

    WINDOW is the most pending tokens, RING the length of the rings, K a power of two of at least WINDOW. The
    checkpoint is read COLUMNS at a time, a ring RING_COLUMNS; ONE_PASS: one that is written, but once. With SWAPS the
    order of the sequences depends on which are written. The grid, strides and OVERLAP are those of the other kernels.
    """
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    parts: tl.constexpr = H // HEADS
    program = tl.program_id(0)
    place = (program // (parts * blocks)).to(tl.int64)
    first_head = program // blocks % parts * HEADS
    first_row = program % blocks * BLOCK_P
    rows = first_row + tl.arange(0, BLOCK_P)
    row_mask = inside(rows, P, BLOCK_P)
    if EARLY:
        gdc_launch_dependents()
        if program * HEADS < EARLY:
            slot = slot_of(state_batch_indices, state_batch_indices_stride, place, slots, PAD, None, True)
            if slot >= 0:
                first_tile = state + slot * state_stride + (first_head.to(tl.int64) * (P * N) + first_row * N)
                for i in tl.static_range(HEADS):
                    prefetch_elements(first_tile + i * (P * N), BLOCK_P * N)
        gdc_wait()
    elif OVERLAP:
        gdc_wait()
        gdc_launch_dependents()

    sequence, slot, first, count = sequence_at(
        place, tl.num_programs(0) // (parts * blocks), state_batch_indices, state_batch_indices_stride, slots,
        replay_start, replay_pending, replay_start_stride, replay_pending_stride, PAD, WINDOW, RING, SWAPS,
    )  # fmt: skip
    begin, length = tokens_of(cu_seqlens, cu_seqlens_stride, sequence, tokens)
    if length <= 0:
        return
    # Loads wait for what is loaded or stored before and could be their address or at it: few of them wait for the slot.
    group = first_head // (H // G)
    x = at_first(x, x_stride, x_token_stride, sequence, begin)
    dt = at_first(dt, dt_stride, dt_token_stride, sequence, begin)
    B = at_first(B, B_stride, B_token_stride, sequence, begin) + group * N
    C = at_first(C, C_stride, C_token_stride, sequence, begin) + group * N
    z = z if z is None else at_first(z, z_stride, z_token_stride, sequence, begin)
    out = at_first(out, out_stride, out_token_stride, sequence, begin)
    # One number for each head, taken out of here where that head is computed.
    numbers = tl.arange(0, HEADS)
    raw_d = tl.load(dt + first_head + numbers)
    raw_rates = tl.load(A + first_head + numbers)
    raw_bias = dt_bias if dt_bias is None else tl.load(dt_bias + first_head + numbers)
    live = slot >= 0
    state += slot * state_stride
    scale = state_scale if state_scale is None else state_scale + slot * state_scale_stride
    replay_x += slot * replay_x_stride
    replay_dt += slot * replay_dt_stride
    ring_B = replay_B + slot * replay_B_stride + group.to(tl.int64) * (RING * N)
    row = row_after(first, count, RING)
    flushes = live & (count + 1 > WINDOW)
    all_d = raw_d.to(tl.float32)
    if dt_bias is not None:
        all_d += raw_bias.to(tl.float32)
    if SOFTPLUS:
        all_d = softplus(all_d)
    all_rates = raw_rates.to(tl.float32) * LOG2_E

    # What a group's heads have in common. The last of several loads decides in which layout it is computed.
    columns = tl.arange(0, COLUMNS)[None, :]
    # As many rows of the same as the threads hold side by side of a tile of the state.
    same = tl.zeros((TOGETHER, 1), tl.int32)
    Cs = ()
    for column in tl.static_range(0, N, COLUMNS):
        Cs += (_wide(C + column + (same + columns), inside(same + (column + columns), N, COLUMNS)),)
    back = tl.arange(0, K)
    ring_rows = row_after(first, count - 1 - back, RING)
    there = back < count
    ring_columns = tl.arange(0, RING_COLUMNS)[None, :]
    ring_same = tl.zeros((RING_TOGETHER, 1), tl.int32)
    dots = tl.zeros((K // RING_TOGETHER, RING_TOGETHER, RING_COLUMNS), tl.float32)
    new_dots = tl.zeros((RING_TOGETHER, RING_COLUMNS), tl.float32)
    for column in tl.static_range(0, N, RING_COLUMNS):
        mask = inside(column + ring_columns, N, RING_COLUMNS)
        same_mask = inside(ring_same + (column + ring_columns), N, RING_COLUMNS)
        ring_C = _wide(C + column + (ring_same + ring_columns), same_mask)
        old_B = _wide(ring_B + ring_rows[:, None] * N + column + ring_columns, there[:, None] & mask)
        dots = tl.fma(old_B.reshape(dots.shape), tl.broadcast_to(ring_C[None, :, :], dots.shape), dots)
        new_dots = tl.fma(_wide(B + column + (ring_same + ring_columns), same_mask), ring_C, new_dots)
    dots = tl.sum(dots, 2).reshape(K)
    new_dot = tl.max(tl.sum(new_dots, 1), 0)

    token = (all_d, all_rates, new_dot)
    pending = (first, count, row, ring_rows, there, dots)
    if ONE_PASS and flushes:
        _read_and_advance(
            state, x, z, D, scale, out, replay_x, replay_dt, C, ring_B, token, pending, (first_head, first_row),
            rand_seed, slot * (H * P * N), P, N, K, RING, HEADS, BLOCK_P, BLOCK_N, WARPS, W, STORED, B_PARTS, ROUNDS,
            TIED_D, FLUSH_STAGES,
        )  # fmt: skip
    else:
        for i in tl.range(0, HEADS, num_stages=STAGES):
            head = first_head + i
            tile = state + (head.to(tl.int64) * (P * N) + rows[:, None] * N)
            products = tl.zeros((BLOCK_P // TOGETHER, TOGETHER, COLUMNS), tl.float32)
            for j in tl.static_range(len(Cs)):
                tile_mask = row_mask[:, None] & inside(j * COLUMNS + columns, N, COLUMNS)
                old = tl.load(tile + j * COLUMNS + columns, mask=tile_mask & live, other=0)
                products = _added_products(products, old, Cs[j], STORED)
            _write(
                tl.sum(products, 2).reshape(BLOCK_P), i, head, (rows, row_mask, live, live & (first_row == 0)),
                x, z, D, scale, out, replay_x, replay_dt, token, pending, P, K, RING, TIED_D,
            )  # fmt: skip
    # Late, as loads would wait for it.
    if live & (first_row == 0) & (first_head % (H // G) == 0):
        all_columns = tl.arange(0, BLOCK_N)
        columns_mask = inside(all_columns, N, BLOCK_N)
        new_B = tl.load(B + all_columns, mask=columns_mask, other=0)
        tl.store(ring_B + row * N + all_columns, new_B, mask=columns_mask)
    if flushes and not ONE_PASS:
        advance_checkpoints(
            state, scale, replay_x, ring_B, replay_dt, A, (first, count), (first_head, first_row), rand_seed,
            slot * (H * P * N), P, N, K, RING, HEADS, BLOCK_P, BLOCK_N, WARPS, W, STORED, B_PARTS, ROUNDS, FLUSH_STAGES,
        )  # fmt: skip


@triton.jit
def sequence_at(
    place,
    sequences,
    table,
    table_stride,
    slots,
    start,
    pending,
    start_stride,
    pending_stride,
    PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    RING: tl.constexpr,
    SWAPS: tl.constexpr,
):
    """Return the sequence at a place in the order of programs, its slot, its first pending row and how many there are.

    A flush takes a program longer, and is not what the last ones should do. So with SWAPS a sequence of the later half
    that flushes changes places with the one that is half of them ahead, unless that one flushes, too.
    """
    slot = slot_of(table, table_stride, place, slots, PAD)
    first, count = read_cursor(start, pending, slot, start_stride, pending_stride)
    sequence = place
    if SWAPS:
        half = sequences // 2
        other = tl.where(place < half, place + half, tl.where(place < 2 * half, place - half, place))
        other_slot = slot_of(table, table_stride, other, slots, PAD)
        other_first, other_count = read_cursor(start, pending, other_slot, start_stride, pending_stride)
        other_flushes = other_count >= WINDOW
        changes = ((count >= WINDOW) != other_flushes) & (other_flushes == (place < half))
        sequence, slot = tl.where(changes, other, place), tl.where(changes, other_slot, slot)
        first, count = tl.where(changes, other_first, first), tl.where(changes, other_count, count)
    first, count = limited(first, count, WINDOW, RING)
    return sequence, slot, first, count


@triton.jit
def _read_and_advance(
    state,
    x,
    z,
    D,
    scale,
    out,
    replay_x,
    replay_dt,
    C,
    ring_B,
    token,
    pending,
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
    TIED_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the output, and advance the checkpoint, of which each element is read once."""
    first, count, _, ring_rows, there, _ = pending
    first_head, first_row = place
    TURN: tl.constexpr = 8 * WARPS
    ROWS: tl.constexpr = 2 * TURN
    blocks: tl.constexpr = BLOCK_P // ROWS
    columns = tl.arange(0, BLOCK_N)
    B_mask = there[:, None] & inside(columns, N, BLOCK_N)[None, :]
    Bs = mixed(tl.load(ring_B + ring_rows[:, None] * N + columns[None, :], mask=B_mask, other=0.0), W)
    same = tl.zeros((TURN, 1), tl.int32)
    group = tl.arange(0, W)[None, :]
    for i in tl.range(0, HEADS * blocks, num_stages=STAGES):
        block = (first_head + i // blocks, first_row + i % blocks * ROWS, 0)
        rows = block[1] + tl.arange(0, ROWS)
        row_mask = inside(rows, P, ROWS)
        tile, mask = tile_of(block, P, N, ROWS, BLOCK_N, WARPS, W)
        old = tl.load(state + tile, mask=mask, other=0)
        parts = groups_of(old)
        products = tl.zeros((2, TURN, W), tl.float32)
        for j in tl.static_range(len(parts)):
            # Loaded again for each block, so that they take no registers in between.
            Cs = _wide(C + j * W + (same + group), inside(same + (j * W + group), N, W))
            products = _added_products(products, parts[j], Cs, STORED)
        row_sums = tl.sum(products, 2).reshape(2, WARPS, 8).permute(1, 0, 2).reshape(ROWS)
        old_x, rate = _write(
            row_sums, i // blocks, block[0], (rows, row_mask, True, block[1] == 0),
            x, z, D, scale, out, replay_x, replay_dt, token, pending, P, K, RING, TIED_D,
        )  # fmt: skip
        advance(
            old, scale, old_x, Bs, rate, replay_dt, (first, count), block, (state + tile, mask), seed, first_element,
            P, N, K, RING, ROWS, BLOCK_N, WARPS, W, STORED, B_PARTS, ROUNDS,
        )  # fmt: skip


@triton.jit
def _added_products(products, old, C, STORED: tl.constexpr):
    """Return products with those of some columns of a checkpoint added; C is the same for all rows."""
    old = pairs_to_float32(old) if STORED == "bfloat16" else widen(old, STORED)
    return tl.fma(old.reshape(products.shape), tl.broadcast_to(C[None, :, :], products.shape), products)


@triton.jit
def _write(
    row_sums,
    i,
    head,
    block,
    x,
    z,
    D,
    scale,
    out,
    replay_x,
    replay_dt,
    token,
    pending,
    P: tl.constexpr,
    K: tl.constexpr,
    RING: tl.constexpr,
    TIED_D: tl.constexpr,
):
    """Write rows of a head's output and what the rings keep of the token, from the products of the checkpoint with C.

    Returns:
        x of the pending tokens, and A over log(2).
    """
    rows, row_mask, live, writes_dt = block
    all_d, all_rates, new_dot = token
    first, count, row, ring_rows, there, dots = pending
    numbers = tl.arange(0, all_d.shape[0])
    ring_x = replay_x + head.to(tl.int64) * (RING * P)
    ring_dt = replay_dt + head * RING
    xs = tl.load(x + head * P + rows, mask=row_mask)
    d = tl.sum(tl.where(numbers == i, all_d, 0.0), 0)
    rate = tl.sum(tl.where(numbers == i, all_rates, 0.0), 0)
    old_d, later = pending_steps(ring_dt, first, count, d, K, RING)
    weights = tl.where(there, dots * (old_d * tl.exp2(later * rate)), 0.0)
    old_x = _wide(ring_x + ring_rows[:, None] * P + rows[None, :], there[:, None] & row_mask[None, :])

    y = row_sums * tl.exp2((tl.sum(old_d, 0) + d) * rate)
    if scale is not None:
        y *= load(scale + head * P + rows, row_mask & live)
    y += tl.sum(old_x * weights[:, None], 0)
    y += xs.to(tl.float32) * (d * new_dot)
    skip = D if D is None else by_row(D, head, rows, row_mask, P, TIED_D)
    gate = z if z is None else load(z + head * P + rows, row_mask)
    y = gated_output(y, xs.to(tl.float32), skip, gate)
    tl.store(out + head * P + rows, y.to(out.dtype.element_ty), mask=row_mask)
    tl.store(ring_x + row * P + rows, xs, mask=row_mask & live)
    tl.store(ring_dt + row, d, mask=writes_dt)
    return old_x, rate


@triton.jit
def _wide(pointers, mask):
    """Load as float32 what threads hold in pairs, 0 where the mask is false."""
    return pairs_to_float32(tl.load(pointers, mask=mask, other=0.0))
