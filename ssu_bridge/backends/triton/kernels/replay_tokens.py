"""Several new tokens against a replay state, by matrix products: of the pending tokens and of the new ones.

With the decay a of what a sequence starts from, and what has happened to each pending token since, w,

    y[i] = 2^s[i] (a checkpoint . C[i] + sum over pending j of w[j] d[j] (B[j] . C[i]) x[j])
           + sum over new j <= i of 2^(s[i] - s[j]) d[j] (B[j] . C[i]) x[j]

in which s sums up the decays of the new tokens. A program does this for a block of rows (headdim) of one head of one
sequence. The checkpoint is only read, but by a call for which the ring has no room.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ssu_bridge.backends.triton.kernels.chunks import decayed, in_two, summed
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
from ssu_bridge.backends.triton.kernels.products import product
from ssu_bridge.backends.triton.kernels.replay import advance_checkpoints, cursor_of, pending_steps, row_after
from ssu_bridge.backends.triton.kernels.rounding import widen


@triton.jit
def replay_tokens(
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
    MOST: tl.constexpr,
    K: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
    WARPS: tl.constexpr,
    W: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
    FLUSH_STAGES: tl.constexpr,
    S_PARTS: tl.constexpr,
    X_PARTS: tl.constexpr,
    B_PARTS: tl.constexpr,
    C_PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Do what ``replay_token`` does with the same arguments, for at most MOST tokens of each sequence.

    Q and K are powers of two of at least the number of tokens and WINDOW. Columns are taken PART at a time; for W and
    PARTS see the matrix form.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    parts: tl.constexpr = H // HEADS
    program = tl.program_id(0)
    sequence = (program // (parts * blocks)).to(tl.int64)
    first_head = program // blocks % parts * HEADS
    first_row = program % blocks * BLOCK_P
    rows = first_row + tl.arange(0, BLOCK_P)
    row_mask = inside(rows, P, BLOCK_P)

    begin, length = tokens_of(cu_seqlens, cu_seqlens_stride, sequence, tokens)
    length = tl.minimum(length, MOST)
    if length <= 0:
        return
    slot = slot_of(state_batch_indices, state_batch_indices_stride, sequence, slots, PAD)
    live = slot >= 0
    first, count = cursor_of(
        replay_start, replay_pending, slot, replay_start_stride, replay_pending_stride, WINDOW, RING
    )
    state += slot * state_stride
    scale = state_scale if state_scale is None else state_scale + slot * state_scale_stride
    group = first_head // (H // G)
    x = at_first(x, x_stride, x_token_stride, sequence, begin) + rows
    dt = at_first(dt, dt_stride, dt_token_stride, sequence, begin)
    B = at_first(B, B_stride, B_token_stride, sequence, begin) + group * N
    C = at_first(C, C_stride, C_token_stride, sequence, begin) + group * N
    z = z if z is None else at_first(z, z_stride, z_token_stride, sequence, begin) + rows
    out = at_first(out, out_stride, out_token_stride, sequence, begin) + rows
    replay_x += slot * replay_x_stride
    replay_dt += slot * replay_dt_stride
    ring_B = replay_B + slot * replay_B_stride + group.to(tl.int64) * (RING * N)

    # What a group's heads have in common.
    t = tl.arange(0, Q)
    there = t < length
    at = t.to(tl.int64)[:, None]
    new_rows = row_after(first, count + t, RING)[:, None]
    back = tl.arange(0, K)
    is_pending = back < count
    ring_rows = row_after(first, count - 1 - back, RING)[:, None]
    is_writer = live & (first_row == 0) & (first_head % (H // G) == 0)
    products = tl.zeros((Q, Q), tl.float32)
    old_products = tl.zeros((Q, K), tl.float32)
    Cs = ()
    for column in tl.static_range(0, N, PART):
        columns = column + tl.arange(0, PART)[None, :]
        token_mask = there[:, None] & inside(columns, N, PART)
        new_B = tl.load(B + at * B_token_stride + columns, mask=token_mask, other=0.0)
        new_C = tl.load(C + at * C_token_stride + columns, mask=token_mask, other=0.0)
        old_B_mask = is_pending[:, None] & inside(columns, N, PART)
        old_B = tl.load(ring_B + ring_rows * N + columns, mask=old_B_mask, other=0.0)
        tl.store(ring_B + new_rows * N + columns, new_B, mask=token_mask & is_writer)
        products = product(new_C, tl.trans(new_B), products, C_PARTS, B_PARTS)
        old_products = product(new_C, tl.trans(old_B), old_products, C_PARTS, B_PARTS)
        Cs += (new_C,)

    # A column for each head, taken out of here where that head is computed.
    numbers = tl.arange(0, HEADS)[None, :]
    raw_d = load(dt + at * dt_token_stride + (first_head + numbers), there[:, None] & (numbers >= 0))
    bias = dt_bias if dt_bias is None else tl.load(dt_bias + first_head + numbers).to(tl.float32)
    all_d = tl.where(there[:, None], time_step(raw_d, bias, SOFTPLUS), 0.0)
    ring_mask = there[:, None] & (numbers >= 0) & (live & (first_row == 0))
    tl.store(replay_dt + (first_head + numbers) * RING + new_rows, all_d, mask=ring_mask)

    mask = there[:, None] & row_mask[None, :]
    on_path = t[:, None] <= t[None, :]
    for i in tl.range(0, HEADS, num_stages=STAGES):
        head = first_head + i
        tile = state + (head.to(tl.int64) * (P * N) + rows[:, None] * N)
        zeros = tl.zeros((Q, BLOCK_P), tl.float32)
        before = zeros
        for j in tl.static_range(len(Cs)):
            columns = j * PART + tl.arange(0, PART)[None, :]
            old = tl.load(tile + columns, mask=row_mask[:, None] & inside(columns, N, PART) & live, other=0)
            if STORED != "bfloat16":
                old = widen(old, STORED)
            before = product(Cs[j], tl.trans(old), before, C_PARTS, S_PARTS)
        ring_x = replay_x + head.to(tl.int64) * (RING * P)
        xs = tl.load(x + at * x_token_stride + head * P, mask=mask, other=0.0)
        old_x_mask = is_pending[:, None] & row_mask[None, :]
        old_x = tl.load(ring_x + ring_rows * P + rows[None, :], mask=old_x_mask, other=0.0)
        old_d, later = pending_steps(replay_dt + head * RING, first, count, 0.0, K, RING)
        rate = tl.load(A + head).to(tl.float32) * LOG2_E
        d = tl.sum(tl.where(numbers == i, all_d, 0.0), 1)
        coarse, fine = in_two(rate * d)
        coarse, fine, d = summed(coarse, fine, d)
        up = tl.exp2(fine)

        if scale is not None:
            before *= load(scale + head * P + rows, row_mask & live)[None, :]
        old_weights = old_products * tl.where(is_pending, old_d * tl.exp2(later * rate), 0.0)[None, :]
        weights = tl.trans(decayed(tl.trans(products), coarse, tl.div_rn(d, up), on_path))
        old_y = product(old_weights, old_x, zeros, 3, X_PARTS)
        before = tl.fma(before, tl.exp2(tl.sum(old_d, 0) * rate), old_y)
        y = tl.fma(before, tl.exp2(coarse)[:, None], product(weights, xs, zeros, 3, X_PARTS)) * up[:, None]

        skip = D if D is None else by_row(D, head, rows, row_mask, P, TIED_D)
        if skip is not None:
            y += xs.to(tl.float32) * (skip if len(skip.shape) == 0 else skip[None, :])
        if z is not None:
            y = gated_output(y, 0.0, None, load(z + at * z_token_stride + head * P, mask))
        tl.store(out + at * out_token_stride + head * P, y.to(out.dtype.element_ty), mask=mask)
        tl.store(ring_x + new_rows * P + rows[None, :], xs, mask=mask & live)

    if live & (count + length > WINDOW):
        advance_checkpoints(
            state, scale, replay_x, ring_B, replay_dt, A, (first, count), (first_head, first_row), rand_seed,
            slot * (H * P * N), P, N, K, RING, HEADS, BLOCK_P, BLOCK_N, WARPS, W, STORED, B_PARTS, ROUNDS, FLUSH_STAGES,
        )  # fmt: skip
