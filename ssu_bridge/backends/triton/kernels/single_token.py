"""The single-token step: a program updates a block of rows (headdim) of one head of one sequence.

Everything is float32 between load and store. Products and sums are fused only where ``fma`` says so (the compiler is
told not to choose), so that an element's bits do not depend on the tile that computes it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ssu_bridge.backends.triton.kernels.common import (
    by_row,
    decay_of,
    gated_output,
    inside,
    load,
    prefetch,
    slot_of,
    time_step,
    to_float32,
)
from ssu_bridge.backends.triton.kernels.rounding import rounded, widen


@triton.jit
def single_token(
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
    dst_state_batch_indices,
    state_scale,
    rand_seed,
    out,
    slots,
    state_stride,
    x_stride,
    dt_stride,
    B_stride,
    C_stride,
    z_stride,
    state_batch_indices_stride,
    dst_state_batch_indices_stride,
    state_scale_stride,
    out_stride,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    TIED_DT: tl.constexpr,
    TIED_A: tl.constexpr,
    TIED_D: tl.constexpr,
    TIED_DT_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PAD: tl.constexpr,
    STORED: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Advance ``state`` in place and write ``out``. An absent array is None; strides are those of the first axis.

    STORED is the dtype of the state's elements, as ``rounding`` names it, and ROUNDS those of the random generator.
    The grid has a program for each sequence, head and block of rows, in this order. With OVERLAP it may start before
    the kernels ahead of it are done, and lets the next one start; neither touches memory before the other is done, but
    that the first EARLY programs have their own tiles brought from memory to the cache. A program has the tile of the
    program AHEAD of it brought there, unless AHEAD is 0.
    """
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    if EARLY:
        gdc_launch_dependents()
        prefetch(
            program, EARLY, state, state_batch_indices, state_stride, state_batch_indices_stride, slots, H * blocks,
            BLOCK_P * N, PAD, 1, True,
        )  # fmt: skip
        gdc_wait()
    elif OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    sequence = (program // (H * blocks)).to(tl.int64)
    head = program // blocks % H
    rows = program % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = head * P + rows
    columns = tl.arange(0, BLOCK_N)
    row_mask, column_mask = inside(rows, P, BLOCK_P), inside(columns, N, BLOCK_N)
    tile_mask = row_mask[:, None] & column_mask[None, :]

    source = slot_of(state_batch_indices, state_batch_indices_stride, sequence, slots, PAD)
    load_mask = tile_mask if state_batch_indices is None else tile_mask & (source >= 0)
    tile = head.to(tl.int64) * (P * N) + (rows[:, None] * N + columns[None, :])
    loaded = tl.load(state + source * state_stride + tile, mask=load_mask, other=0)
    xs = load(x + sequence * x_stride + channels, row_mask)
    d = by_row(dt + sequence * dt_stride, head, rows, row_mask, P, TIED_DT)
    bias = dt_bias if dt_bias is None else by_row(dt_bias, head, rows, row_mask, P, TIED_DT_BIAS)
    group = head // (H // G) * N + columns
    Bs = tl.load(B + sequence * B_stride + group, mask=column_mask, other=0.0)
    Cs = tl.load(C + sequence * C_stride + group, mask=column_mask, other=0.0)
    As = tl.load(A + head).to(tl.float32) if TIED_A else load(A + tile, tile_mask)
    if state_scale is not None:
        old_scales = load(state_scale + source * state_scale_stride + channels, row_mask & (source >= 0))
    if AHEAD:
        # While this program waits for its own tile. One of several programs looks up where all of theirs are.
        together: tl.constexpr = 4 if H * blocks % 4 == 0 and AHEAD % 4 == 0 else 1
        if program % together == 0:
            prefetch(
                program + AHEAD, tl.num_programs(0), state, state_batch_indices, state_stride,
                state_batch_indices_stride, slots, H * blocks, BLOCK_P * N, PAD, together,
            )  # fmt: skip

    old = widen(loaded, STORED, True)
    if state_scale is not None:
        old *= old_scales[:, None]
    d = time_step(d, bias, SOFTPLUS)
    Bs, Cs = to_float32(Bs), to_float32(Cs)
    new = tl.fma(old, decay_of(As, d, BLOCK_P, BLOCK_N), (d * xs)[:, None] * Bs[None, :])

    # Before the sum over the columns, which waits for other warps.
    target, store_mask = source, load_mask
    if dst_state_batch_indices is not None:
        target = slot_of(dst_state_batch_indices, dst_state_batch_indices_stride, sequence, slots, PAD)
        store_mask = load_mask & (target >= 0)
    scale = state_scale if state_scale is None else state_scale + target * state_scale_stride
    seed = rand_seed if rand_seed is None else tl.load(rand_seed)
    stored = rounded(
        new, scale, (source >= 0) & (target >= 0), channels, row_mask, seed,
        target * (H * P * N), 0, 0, N, BLOCK_N, STORED, ROUNDS,
    )  # fmt: skip
    tl.store(state + target * state_stride + tile, stored, mask=store_mask)

    y = tl.sum(new * Cs[None, :], axis=1)
    skip = D if D is None else by_row(D, head, rows, row_mask, P, TIED_D)
    gate = z if z is None else load(z + sequence * z_stride + channels, row_mask)
    y = gated_output(y, xs, skip, gate)
    tl.store(out + sequence * out_stride + channels, y.to(out.dtype.element_ty), mask=row_mask)
