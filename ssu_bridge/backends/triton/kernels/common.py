"""Device functions that the kernels share.

Everything is float32 between load and store. Products and sums are fused only where ``fma`` says so (the compiler is
told not to choose), so that an element's bits do not depend on the tile that computes it.
"""

import triton
import triton.language as tl
from triton import knobs

# The interpreter runs no inline assembly. What it runs in its place gives the same bits.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def slot_of(table, stride, sequence, slots, PAD: tl.constexpr, there=None, VOLATILE: tl.constexpr = False):
    """Return the slot of a sequence, -1 for a pad, and where the table is not ``there``.

    A load that is VOLATILE leaves nothing in the first-level cache, which a later one could take for the table.
    """
    if table is None:
        return sequence
    else:
        other = None if there is None else -1
        index = tl.load(table + sequence * stride, mask=there, other=other, volatile=VOLATILE)
        return checked(index.to(tl.int64), slots, PAD)


@triton.jit
def checked(index, size, PAD: tl.constexpr):
    """Return an index, -1 for one that is the pad or lies outside. It is an int64."""
    # As an unsigned number, one below zero is larger than any size.
    outside = index.to(tl.uint64, bitcast=True) >= size.to(tl.uint64)
    return tl.where(outside | (index == PAD) if PAD >= 0 else outside, -1, index)


@triton.jit
def by_row(pointer, head, rows, row_mask, P: tl.constexpr, TIED: tl.constexpr):
    """Load a parameter: one number if it is tied to the head, else one a row."""
    if TIED:
        return tl.load(pointer + head).to(tl.float32)
    else:
        return load(pointer + head * P + rows, row_mask)


@triton.jit
def inside(indices, size: tl.constexpr, BLOCK: tl.constexpr):
    """Return which indices are below a size; where all are, a constant, and the compiler drops the mask."""
    if size % BLOCK:
        return indices < size
    else:
        return tl.full((BLOCK,), True, tl.int1)


@triton.jit
def load(pointers, mask):
    """Load as float32, 0 where the mask is false."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def prefetch(
    tile,
    tiles,
    state,
    state_batch_indices,
    state_stride,
    state_batch_indices_stride,
    slots,
    TILES_OF_EACH: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PAD: tl.constexpr,
    TOGETHER: tl.constexpr = 1,
    EARLY: tl.constexpr = False,
):
    """Have tiles that programs update brought to the second-level cache, if there are so many: TOGETHER of a slot.

    EARLY: kernels ahead of this one may still write to the table and to the state. Of a number in the table that is out
    of date, a tile that nobody needs is brought; what they write to a tile goes to the same cache.
    """
    if tile < tiles:
        sequence = (tile // TILES_OF_EACH).to(tl.int64)
        slot = slot_of(state_batch_indices, state_batch_indices_stride, sequence, slots, PAD, None, EARLY)
        if slot >= 0:
            tile_of_slot = (tile % TILES_OF_EACH).to(tl.int64)
            prefetch_elements(state + slot * state_stride + tile_of_slot * ELEMENTS, TOGETHER * ELEMENTS)


@triton.jit
def prefetch_elements(first, ELEMENTS: tl.constexpr):
    """Have one thread ask for so many elements to be brought to the second-level cache; their bytes are whole 16s."""
    size: tl.constexpr = ELEMENTS * (first.dtype.element_ty.primitive_bitwidth // 8)
    tl.inline_asm_elementwise(
        """{ .reg .pred first; .reg .b32 thread;
        mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0;
        @first cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, thread; }""",
        "=r,l,r", [first.to(tl.int64), tl.full((), size, tl.int32)], tl.int32, False, 1,
    )  # fmt: skip


@triton.jit
def to_float32(loaded):
    """Convert what each thread loaded a part of and every warp needs.

    Of a plain conversion the compiler hands the narrow numbers from thread to thread, one at a time, and each thread
    converts all that it gets.
    """
    if INTERPRETED or loaded.dtype == tl.float32:
        return loaded.to(tl.float32)
    elif loaded.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 zero; mov.b16 zero, 0; mov.b32 $0, {zero, $1}; }", "=f,h", [loaded], tl.float32, True, 1
        )
    else:
        return tl.inline_asm_elementwise("cvt.f32.f16 $0, $1;", "=f,h", [loaded], tl.float32, True, 1)


@triton.jit
def pairs_to_float32(loaded):
    """Convert numbers that threads hold in pairs: two bfloat16 by two instructions, where the compiler takes three."""
    if INTERPRETED or loaded.dtype != tl.bfloat16:
        return loaded.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=r,r", [loaded], tl.int32, True, 2
        ).to(tl.float32, bitcast=True)


@triton.jit
def time_step(dt, bias, SOFTPLUS: tl.constexpr):
    """Return dt, biased if there is a bias and made positive: one number if it is tied to the head, else one a row."""
    d = dt
    if bias is not None:
        d += bias
    if SOFTPLUS:
        d = softplus(d)
    return d


@triton.jit
def decay_of(A, d, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return what each element of a tile's state is multiplied with; A is one number or a tile."""
    if len(A.shape) == 0:
        decay = tl.exp2(A * d * LOG2_E)
        decay = decay if len(d.shape) == 0 else decay[:, None]
    else:
        d_column = d if len(d.shape) == 0 else d[:, None]
        decay = tl.exp2(A * d_column * LOG2_E)
    return tl.broadcast_to(decay, (BLOCK_P, BLOCK_N))


@triton.jit
def gated_output(y, x, D, z):
    """Return the output of a state that gives y: with the skip D*x and the gate z, where there are such."""
    if D is not None:
        y += D * x
    if z is not None:
        y *= z * sigmoid(z)
    return y


@triton.jit
def softplus(d):
    """log(1 + exp(d)), as accurate relative to the result for very negative d as anywhere.

    With t = exp(-|d|) it is max(d, 0) + log(1 + t), and log(1 + t) = 2 atanh(s) with s = t / (2 + t) of at most 1/3.
    Above 20 the second term is below half an ulp of d. A NaN comes through t.
    """
    t = tl.exp2(-tl.abs(d) * LOG2_E)
    s = t * _near_inverse(2 + t)
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
def _near_inverse(v):
    """1 / v, as a division has it on a GPU, of a number that needs no scaling for that."""
    if INTERPRETED:
        return 1 / v
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], tl.float32, True, 1)


@triton.jit
def sigmoid(v):
    """1 / (1 + exp(-v)) without an exponential that overflows."""
    t = tl.exp2(-tl.abs(v) * LOG2_E)
    return tl.where(v < 0, t, 1.0) / (1 + t)
