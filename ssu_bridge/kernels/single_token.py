"""The single-token step: a program updates a block of rows (headdim) of one head of one sequence.

Everything is float32 between load and store. Products and sums are fused only where ``fma`` says so (the compiler is
told not to choose), so that an element's bits do not depend on the tile that computes it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2_E = tl.constexpr(1.4426950408889634)


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
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Advance ``state`` in place and write ``out``. An absent array is None; strides are those of the first axis.

    The grid has a program for each sequence, head and block of rows, in this order. With OVERLAP it may start before
    the kernels ahead of it are done, and lets the next one start; neither touches memory before the other is done.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    sequence = (program // (H * blocks)).to(tl.int64)
    head = program // blocks % H
    rows = program % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.arange(0, BLOCK_N)
    row_mask, column_mask = _inside(rows, P, BLOCK_P), _inside(columns, N, BLOCK_N)
    tile_mask = row_mask[:, None] & column_mask[None, :]

    source = _slot(state_batch_indices, state_batch_indices_stride, sequence, slots, PAD)
    load_mask = tile_mask if state_batch_indices is None else tile_mask & (source >= 0)
    tile = head.to(tl.int64) * (P * N) + (rows[:, None] * N + columns[None, :])
    old = _load(state + source * state_stride + tile, load_mask)

    xs = _load(x + sequence * x_stride + head * P + rows, row_mask)
    d = _by_row(dt + sequence * dt_stride, head, rows, row_mask, P, TIED_DT)
    if dt_bias is not None:
        d += _by_row(dt_bias, head, rows, row_mask, P, TIED_DT_BIAS)
    if SOFTPLUS:
        d = _softplus(d)
    group = head // (H // G)
    Bs = _load(B + sequence * B_stride + group * N + columns, column_mask)
    Cs = _load(C + sequence * C_stride + group * N + columns, column_mask)

    if TIED_A:
        decay = tl.exp2(tl.load(A + head).to(tl.float32) * d * LOG2_E)
        decay = decay if len(d.shape) == 0 else decay[:, None]
    else:
        d_column = d if len(d.shape) == 0 else d[:, None]
        decay = tl.exp2(_load(A + tile, tile_mask) * d_column * LOG2_E)
    decay = tl.broadcast_to(decay, (BLOCK_P, BLOCK_N))
    new = tl.fma(old, decay, (d * xs)[:, None] * Bs[None, :])

    # Before the sum over the columns, which waits for other warps.
    target, store_mask = source, load_mask
    if dst_state_batch_indices is not None:
        target = _slot(dst_state_batch_indices, dst_state_batch_indices_stride, sequence, slots, PAD)
        store_mask = load_mask & (target >= 0)
    tl.store(state + target * state_stride + tile, new.to(state.dtype.element_ty), mask=store_mask)

    y = tl.sum(new * Cs[None, :], axis=1)
    if D is not None:
        y += _by_row(D, head, rows, row_mask, P, TIED_D) * xs
    if z is not None:
        gate = _load(z + sequence * z_stride + head * P + rows, row_mask)
        y *= gate * _sigmoid(gate)
    tl.store(out + sequence * out_stride + head * P + rows, y.to(out.dtype.element_ty), mask=row_mask)


@triton.jit
def _slot(table, stride, sequence, slots, PAD: tl.constexpr):
    """Return the slot of a sequence, -1 for a pad."""
    if table is None:
        return sequence
    else:
        index = tl.load(table + sequence * stride).to(tl.int64)
        return tl.where((index == PAD) | (index < 0) | (index >= slots), -1, index)


@triton.jit
def _by_row(pointer, head, rows, row_mask, P: tl.constexpr, TIED: tl.constexpr):
    """Load a parameter: one number if it is tied to the head, else one a row."""
    if TIED:
        return tl.load(pointer + head).to(tl.float32)
    else:
        return _load(pointer + head * P + rows, row_mask)


@triton.jit
def _inside(indices, size: tl.constexpr, BLOCK: tl.constexpr):
    """Return which indices are below a size; where all are, a constant, and the compiler drops the mask."""
    if size % BLOCK:
        return indices < size
    else:
        return tl.full((BLOCK,), True, tl.int1)


@triton.jit
def _load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _softplus(d):
    """log(1 + exp(d)), as accurate relative to the result for very negative d as anywhere.

    With t = exp(-|d|) it is max(d, 0) + log(1 + t), and log(1 + t) = 2 atanh(s) with s = t / (2 + t) of at most 1/3.
    Above 20 the second term is below half an ulp of d. A NaN comes through t.
    """
    t = tl.exp2(-tl.abs(d) * LOG2_E)
    s = t / (2 + t)
    q = s * s
    # The series of atanh(s) / s: what is left out is below 3e-9.
    p = 1 / 15
    p = tl.fma(q, p, 1 / 13)
    p = tl.fma(q, p, 1 / 11)
    p = tl.fma(q, p, 1 / 9)
    p = tl.fma(q, p, 1 / 7)
    p = tl.fma(q, p, 1 / 5)
    p = tl.fma(q, p, 1 / 3)
    p = tl.fma(q, p, 1.0)
    return tl.maximum(d, 0) + 2 * s * p


@triton.jit
def _sigmoid(v):
    """1 / (1 + exp(-v)) without an exponential that overflows."""
    t = tl.exp2(-tl.abs(v) * LOG2_E)
    return tl.where(v < 0, t, 1.0) / (1 + t)
