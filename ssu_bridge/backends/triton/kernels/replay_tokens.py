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

from ssu_bridge.backends.triton.kernels.chunks import decayed, in_two, sums
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
from ssu_bridge.backends.triton.kernels.products import in_rows, mixed, product, tile_of
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
    program = tl.program_id(0)
    sequence = (program // (H * blocks)).to(tl.int64)
    head = program // blocks % H
    first_row = program % blocks * BLOCK_P
    rows = first_row + tl.arange(0, BLOCK_P)
    row_mask = inside(rows, P, BLOCK_P)
    channels = head * P + rows

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
    group = head // (H // G)
    x = at_first(x, x_stride, x_token_stride, sequence, begin) + channels
    dt = at_first(dt, dt_stride, dt_token_stride, sequence, begin) + head
    B = at_first(B, B_stride, B_token_stride, sequence, begin) + group * N
    C = at_first(C, C_stride, C_token_stride, sequence, begin) + group * N
    out = at_first(out, out_stride, out_token_stride, sequence, begin) + channels
    replay_x += slot * replay_x_stride
    replay_dt += slot * replay_dt_stride
    ring_x = replay_x + head.to(tl.int64) * (RING * P)
    ring_B = replay_B + slot * replay_B_stride + group.to(tl.int64) * (RING * N)
    ring_dt = replay_dt + head * RING
    rate = tl.load(A + head).to(tl.float32) * LOG2_E

    t = tl.arange(0, Q)
    there = t < length
    at = t.to(tl.int64)
    new_rows = row_after(first, count + t, RING)
    stored = there & live
    raw_d = tl.load(dt + at * dt_token_stride, mask=there, other=0.0).to(tl.float32)
    bias = dt_bias if dt_bias is None else tl.load(dt_bias + head).to(tl.float32)
    d = tl.where(there, time_step(raw_d, bias, SOFTPLUS), 0.0)
    tl.store(ring_dt + new_rows, d, mask=stored & (first_row == 0))
    coarse, fine = in_two(rate * d)
    coarse, fine, d = tl.associative_scan((coarse, fine, d), 0, sums)
    mask = there[:, None] & row_mask[None, :]
    xs = tl.load(x[None, :] + at[:, None] * x_token_stride, mask=mask, other=0.0)
    tl.store(ring_x + new_rows[:, None] * P + rows[None, :], xs, mask=mask & live)

    back = tl.arange(0, K)
    is_pending = back < count
    ring_rows = row_after(first, count - 1 - back, RING)
    old_d, later = pending_steps(ring_dt, first, count, 0.0, K, RING)
    old_x = tl.load(
        ring_x + ring_rows[:, None] * P + rows[None, :], mask=is_pending[:, None] & row_mask[None, :], other=0.0
    )
    before = tl.zeros((BLOCK_P, Q), tl.float32)
    weights = tl.zeros((Q, Q), tl.float32)
    old_weights = tl.zeros((K, Q), tl.float32)
    is_writer = live & (first_row == 0) & (head % (H // G) == 0)
    for column in range(0, N, PART):
        tile, tile_mask = tile_of((head, first_row, column), P, N, BLOCK_P, PART, WARPS, W)
        old = tl.load(state + tile, mask=tile_mask & live, other=0)
        old = mixed(in_rows(old, BLOCK_P, PART, WARPS, W), W)
        if STORED != "bfloat16":
            old = widen(old, STORED)
        columns = column + tl.arange(0, PART)
        column_mask = inside(columns, N, PART)
        token_mask = there[:, None] & column_mask[None, :]
        Bs = tl.load(B + at[:, None] * B_token_stride + columns[None, :], mask=token_mask, other=0.0)
        Cs = tl.load(C + at[:, None] * C_token_stride + columns[None, :], mask=token_mask, other=0.0)
        old_B_mask = is_pending[:, None] & column_mask[None, :]
        old_B = tl.load(ring_B + ring_rows[:, None] * N + columns[None, :], mask=old_B_mask, other=0.0)
        tl.store(ring_B + new_rows[:, None] * N + columns[None, :], Bs, mask=token_mask & is_writer)
        weights = product(Bs, tl.trans(Cs), weights, B_PARTS, C_PARTS)
        old_weights = product(old_B, tl.trans(Cs), old_weights, B_PARTS, C_PARTS)
        before = product(old, tl.trans(mixed(Cs, W)), before, S_PARTS, C_PARTS)

    if scale is not None:
        before *= load(scale + channels, row_mask & live)[:, None]
    old_weights *= (tl.where(is_pending, old_d * tl.exp2(later * rate), 0.0))[:, None]
    zeros = tl.zeros((BLOCK_P, Q), tl.float32)
    before = tl.fma(before, tl.exp2(tl.sum(old_d, 0) * rate), product(tl.trans(old_x), old_weights, zeros, X_PARTS, 3))
    up = tl.exp2(fine)
    weights = decayed(weights, coarse, tl.div_rn(d, up), t[:, None] <= t[None, :])
    y = product(tl.trans(xs), weights, zeros, X_PARTS, 3)
    y = tl.trans(tl.fma(before, tl.exp2(coarse)[None, :], y) * up[None, :])

    skip = D if D is None else by_row(D, head, rows, row_mask, P, TIED_D)
    if skip is not None:
        y += xs.to(tl.float32) * (skip if len(skip.shape) == 0 else skip[None, :])
    if z is not None:
        z = at_first(z, z_stride, z_token_stride, sequence, begin) + channels
        y = gated_output(y, 0.0, None, load(z[None, :] + at[:, None] * z_token_stride, mask))
    tl.store(out[None, :] + at[:, None] * out_token_stride, y.to(out.dtype.element_ty), mask=mask)

    if live & (count + length > WINDOW):
        advance_checkpoints(
            state, scale, replay_x, ring_B, replay_dt, A, (first, count), (head, first_row), rand_seed,
            slot * (H * P * N), P, N, K, RING, 1, BLOCK_P, BLOCK_N, WARPS, W, STORED, B_PARTS, ROUNDS, 1,
        )  # fmt: skip
