"""Between float32 and what a state is stored in: nearest even or stochastically, floats and quantised numbers.

A quantised state holds numbers q with a float32 scale for each row along dstate, and stands for q * scale. What is
stored of a float8 state is handled as bytes, by integer arithmetic, so that every GPU gives the same.
"""

import triton
import triton.language as tl
from triton import knobs

# The interpreter runs no inline assembly. What it runs in its place gives the same bits.
_INTERPRETED = tl.constexpr(knobs.runtime.interpret)
# 1.5 * 2**23: added to a number below 2**22 and subtracted again, it leaves the nearest integer, ties to even.
_ROUNDER = tl.constexpr(12582912.0)
_INFINITY = tl.constexpr(0x7F800000)
# 2**-128, the largest number whose inverse is infinite.
_NO_INVERSE = tl.constexpr(2.938735877055719e-39)


@triton.jit
def widen(stored, STORED: tl.constexpr, BUSY: tl.constexpr = False):
    """Return as float32 what was loaded of a state; of a quantised one without its scale.

    In a kernel that is BUSY most of the time a few slow conversions are better than more instructions.
    """
    if STORED == "float8_e4m3fn":
        byte = stored.to(tl.int32)
        # The same bits lower down in a float32 stand for 2**-120 of the number, subnormals too.
        bits = ((byte & 0x80) << 24) | ((byte & 0x7F) << 20)
        value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
        return tl.where((byte & 0x7F) == 0x7F, float("nan"), value)
    elif STORED == "float8e4nv":
        return stored.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif STORED == "int8" and BUSY:
        return _bytes_to_float32(stored)
    elif STORED == "int8" or STORED == "int16":
        return _extended(stored, STORED).to(tl.float32)
    else:
        return stored.to(tl.float32)


@triton.jit
def _extended(integers, STORED: tl.constexpr):
    """Return integers as int32. From there, but not from fewer bits, GPUs convert to float32 at full speed."""
    if _INTERPRETED:
        return integers.to(tl.int32)
    elif STORED == "int8":
        return tl.inline_asm_elementwise(
            """prmt.b32 $0, $4, 0, 0x8880; prmt.b32 $1, $4, 0, 0x9991;
            prmt.b32 $2, $4, 0, 0xaaa2; prmt.b32 $3, $4, 0, 0xbbb3;""",
            "=r,=r,=r,=r,r", [integers], tl.int32, True, 4,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0, 0x9910; shr.s32 $1, $2, 16;",
            "=r,=r,r", [integers], tl.int32, True, 2,
        )  # fmt: skip


@triton.jit
def _bytes_to_float32(integers):
    """Return 8-bit integers as float32: three of four by one instruction at a quarter of the speed, one by two."""
    if _INTERPRETED:
        return integers.to(tl.float32)
    return tl.inline_asm_elementwise(
        """{ .reg .b32 b, c, d;
        cvt.rn.f32.s8 $0, $4; bfe.s32 b, $4, 8, 8; cvt.rn.f32.s8 $1, b; bfe.s32 c, $4, 16, 8; cvt.rn.f32.s8 $2, c;
        prmt.b32 d, $4, 0, 0xbbb3; cvt.rn.f32.s32 $3, d; }""",
        "=&f,=&f,=&f,=&f,r", [integers], tl.float32, True, 4,
    )  # fmt: skip


@triton.jit
def _inverse(scales):
    """1 / scale, as IEEE has it.

    rcp.rn tests each number for those that its few steps are not right for. Here a test serves four, if there are four.
    """
    if _INTERPRETED:
        return tl.div_rn(1.0, scales)
    elif scales.shape[0] % 4:
        return tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [scales], tl.float32, True, 1)
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .f32 e; .reg .b32 least, most; .reg .pred few;
            min.u32 least, $4, $5; min.u32 least, least, $6; min.u32 least, least, $7;
            max.u32 most, $4, $5; max.u32 most, most, $6; max.u32 most, most, $7;
            setp.gt.u32 few, least, 0x00ffffff; setp.lt.and.u32 few, most, 0x7e000000, few;
            @few bra FEW${:uid};
            rcp.rn.f32 $0, $4; rcp.rn.f32 $1, $5; rcp.rn.f32 $2, $6; rcp.rn.f32 $3, $7;
            bra DONE${:uid};
            FEW${:uid}:
            rcp.approx.ftz.f32 $0, $4; neg.f32 e, $4; fma.rn.f32 e, e, $0, 0f3f800000; fma.rn.f32 $0, $0, e, $0;
            rcp.approx.ftz.f32 $1, $5; neg.f32 e, $5; fma.rn.f32 e, e, $1, 0f3f800000; fma.rn.f32 $1, $1, e, $1;
            rcp.approx.ftz.f32 $2, $6; neg.f32 e, $6; fma.rn.f32 e, e, $2, 0f3f800000; fma.rn.f32 $2, $2, e, $2;
            rcp.approx.ftz.f32 $3, $7; neg.f32 e, $7; fma.rn.f32 e, e, $3, 0f3f800000; fma.rn.f32 $3, $3, e, $3;
            DONE${:uid}: }""",
            "=&f,=&f,=&f,=&f,r,r,r,r", [scales.to(tl.int32, bitcast=True)], tl.float32, True, 4,
        )  # fmt: skip


@triton.jit
def rounded(
    current,
    scale,
    wanted,
    channels,
    row_mask,
    seed,
    first,
    token,
    last,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STORED: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Return a tile of a state as it is stored, and store its scales if there are any and that is ``wanted``."""
    scales = scale if scale is None else row_scale(current, STORED)
    if scale is not None:
        tl.store(scale + channels, scales, mask=row_mask & wanted)
    return as_stored(current, scales, channels, seed, first, token, last, N, BLOCK_N, STORED, ROUNDS)


@triton.jit
def as_stored(
    current,
    scales,
    channels,
    seed,
    first,
    token,
    last,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STORED: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Return a tile of a state as it is stored, with these scales if it has any."""
    if scales is not None:
        current = current * _inverse(scales)[:, None]
    if seed is None:
        return round_to_nearest(current, STORED)
    else:
        words = random_words(seed, first, channels, token, last, N, BLOCK_N, ROUNDS)
        return round_stochastically(current, words, STORED)


@triton.jit
def row_scale(tile, STORED: tl.constexpr):
    """Return the scale with which a row's largest number becomes the largest that can be stored.

    Where 1 / scale would be infinite, it is 1: such a row is stored as zeros.
    """
    largest = tl.reduce(tl.abs(tile), 1, _larger)
    if STORED == "int16":
        scale = largest * (1 / 32767)
    elif STORED == "int8":
        scale = largest * (1 / 127)
    else:
        scale = largest * (1 / 448)
    # Triton takes a subnormal constant for a double unless told.
    return tl.where(scale <= tl.full((), _NO_INVERSE, tl.float32), 1.0, scale)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_to_nearest(value, STORED: tl.constexpr):
    """Round to nearest even, to what is stored; of a quantised state, numbers that are divided by the scale."""
    if STORED == "float32":
        return value
    elif STORED == "bfloat16":
        return value.to(tl.bfloat16)
    elif STORED == "float16":
        return value.to(tl.float16)
    elif STORED == "float8e4nv":
        return value.to(tl.float8e4nv).to(tl.int8, bitcast=True)
    elif STORED == "float8_e4m3fn":
        magnitude = _magnitude(value)
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2**-6 the grid's step is 2**-9.
        steps = tl.minimum(tl.abs(value), 0.015625) * 512.0
        subnormal = (steps + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
        return _stored(value, tl.where(magnitude < (121 << 23), subnormal, normal), STORED)
    else:
        return _nearest_integers(value, STORED)


@triton.jit
def _nearest_integers(value, STORED: tl.constexpr):
    """Return the nearest integers, 0 for NaN.

    A number over its row's scale is at most the largest integer but for what rounding adds, and needs no limit.
    """
    if _INTERPRETED:
        whole = tl.where(value == value, value, 0.0) + _ROUNDER - _ROUNDER
        return whole.to(tl.int8 if STORED == "int8" else tl.int16)
    elif STORED == "int8":
        # From 8.9 on, GPUs have an instruction for two numbers of this.
        return tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, c, d, w;
            cvt.rni.s32.f32 a, $1; cvt.rni.s32.f32 b, $2; cvt.rni.s32.f32 c, $3; cvt.rni.s32.f32 d, $4;
            cvt.pack.sat.s8.s32.b32 w, d, c, 0; cvt.pack.sat.s8.s32.b32 $0, b, a, w; }""",
            "=r,f,f,f,f", [value], tl.int8, True, 4,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 a, b;
            cvt.rni.s32.f32 a, $1; cvt.rni.s32.f32 b, $2; cvt.pack.sat.s16.s32 $0, b, a; }""",
            "=r,f,f", [value], tl.int16, True, 2,
        )  # fmt: skip


@triton.jit
def round_stochastically(value, words, STORED: tl.constexpr):
    """Round up in magnitude with the chance that the way from the grid point below is of the whole step.

    ``words`` are uint32, of which the upper 24 bits count. Where they are less than the part of the step that is below
    the number, their complement added to that part carries into the grid point.
    """
    if STORED == "int8":
        limited = tl.clamp(value, -127.0, 127.0, propagate_nan=tl.PropagateNan.ALL)
        fixed = _truncated(limited * 16777216.0)  # with 24 bits behind the point
        # A negative number is rounded up in magnitude where the words themselves do not carry.
        words = words ^ (~(fixed >> 31)).to(tl.uint32, bitcast=True)
        return _upper_bytes(fixed + (words >> 8).to(tl.int32, bitcast=True))
    elif STORED == "float16":
        return _stored(value, _point(value, words, 10, -14), STORED)
    elif STORED == "bfloat16":
        return _stored(value, _point(value, words, 7, -126), STORED)
    else:
        return _stored(value, _point(value, words, 3, -6), STORED)


@triton.jit
def _truncated(value):
    """Return the integers towards zero, 0 for NaN."""
    if _INTERPRETED:
        return tl.where(value == value, value, 0.0).to(tl.int32)
    return tl.inline_asm_elementwise("cvt.rzi.s32.f32 $0, $1;", "=r,f", [value], tl.int32, True, 1)


@triton.jit
def _upper_bytes(integers):
    if _INTERPRETED:
        return (integers >> 24).to(tl.int8)
    return tl.inline_asm_elementwise(
        """{ .reg .b32 v, w;
        prmt.b32 v, $1, $2, 0x0073; prmt.b32 w, $3, $4, 0x0073; prmt.b32 $0, v, w, 0x5410; }""",
        "=r,r,r,r,r", [integers], tl.int8, True, 4,
    )  # fmt: skip


@triton.jit
def _magnitude(value):
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _point(value, words, MANTISSA: tl.constexpr, LEAST: tl.constexpr):
    """Return the grid point that |value| is rounded to by these words, counted from zero.

    The grid is that of a float format with so many mantissa bits and this least exponent of its normal numbers.
    """
    complement = words ^ 0xFFFFFFFF
    magnitude = _magnitude(value)
    carried = magnitude + (complement >> (9 + MANTISSA)).to(tl.int32, bitcast=True)
    normal = (carried >> (23 - MANTISSA)) - ((LEAST + 126) << MANTISSA)
    if LEAST == -126:
        return normal
    steps = tl.minimum(tl.abs(value), 2.0**LEAST) * 2.0 ** (MANTISSA - LEAST)
    if MANTISSA < 8:
        fixed = _truncated(steps * 16777216.0)
        subnormal = (fixed + (complement >> 8).to(tl.int32, bitcast=True)) >> 24
    else:
        whole = _truncated(steps)
        part = _truncated((steps - whole.to(tl.float32)) * 16777216.0)
        subnormal = whole + (part > (words >> 8).to(tl.int32, bitcast=True))
    return tl.where(magnitude < ((LEAST + 127) << 23), subnormal, normal)


@triton.jit
def _stored(value, point, STORED: tl.constexpr):
    """Return what is stored for a grid point with the sign of ``value``: at most the largest finite number's."""
    bits = value.to(tl.int32, bitcast=True)
    if STORED == "float16":
        finite = (((bits >> 16) & 0x8000) | tl.minimum(point, 0x7BFF)).to(tl.int16).to(tl.float16, bitcast=True)
        return tl.where((bits & 0x7FFFFFFF) >= _INFINITY, value.to(tl.float16), finite)
    elif STORED == "bfloat16":
        finite = (((bits >> 16) & 0x8000) | tl.minimum(point, 0x7F7F)).to(tl.int16).to(tl.bfloat16, bitcast=True)
        return tl.where((bits & 0x7FFFFFFF) >= _INFINITY, value.to(tl.bfloat16), finite)
    else:
        point = tl.where((bits & 0x7FFFFFFF) > _INFINITY, 0x7F, tl.minimum(point, 0x7E))
        return (((bits >> 24) & 0x80) | point).to(tl.int8)


@triton.jit
def random_words(seed, first, channels, token, last, N: tl.constexpr, BLOCK_N: tl.constexpr, ROUNDS: tl.constexpr):
    """Return a uint32 for each element of the tile whose rows begin at the elements ``first + channels * N``.

    Element e takes word e % 4 of the Philox block whose counter is e // 4 (64 bits), ``token`` and ``last``.
    """
    channels = channels.to(tl.int64)[:, None]
    if N % 4:
        elements = first + channels * N + tl.arange(0, BLOCK_N)[None, :]
        a, b, c, d = _philox(seed, elements >> 2, token, last, ROUNDS)
        word = elements & 3
        return tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))
    else:
        blocks = (first >> 2) + channels * (N // 4) + tl.arange(0, BLOCK_N // 4)[None, :]
        a, b, c, d = _philox(seed, blocks, token, last, ROUNDS)
        pairs = tl.join(a.to(tl.uint64) | (b.to(tl.uint64) << 32), c.to(tl.uint64) | (d.to(tl.uint64) << 32))
        return tl.join(pairs.to(tl.uint32), (pairs >> 32).to(tl.uint32)).reshape(channels.shape[0], BLOCK_N)


@triton.jit
def _philox(seed, block, token, last, ROUNDS: tl.constexpr):
    """Return four uint32 for each block: Philox-4x32. One product of 64 bits gives both halves that a round needs."""
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    a, b = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c, d = tl.cast(token, tl.uint32), tl.cast(last, tl.uint32)
    c, d = tl.zeros_like(a) + c, tl.zeros_like(a) + d
    for _ in tl.static_range(ROUNDS):
        first, second = a.to(tl.uint64) * 0xD2511F53, c.to(tl.uint64) * 0xCD9E8D57
        a, c = (second >> 32).to(tl.uint32) ^ b ^ key0, (first >> 32).to(tl.uint32) ^ d ^ key1
        b, d = second.to(tl.uint32), first.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return a, b, c, d
