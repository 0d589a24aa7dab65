"""Between float32 and what a state is stored in: nearest even or stochastically, floats and quantised numbers.

A quantised state holds numbers q with a float32 scale for each row along dstate, and stands for q * scale. What is
stored of a float8 state is handled as bytes, by integer arithmetic, so that every GPU gives the same.
"""

import triton
import triton.language as tl

# 1.5 * 2**23: added to a number below 2**22 and subtracted again, it leaves the nearest integer, ties to even.
_ROUNDER = tl.constexpr(12582912.0)
_ROUNDER_BITS = tl.constexpr(0x4B400000)
_SIGNIFICAND_BITS = tl.constexpr(23)
_EXPONENT_BIAS = tl.constexpr(127)
_INFINITY = tl.constexpr(0x7F800000)
# 2**-128, the largest number whose inverse is infinite.
_NO_INVERSE = tl.constexpr(2.938735877055719e-39)


@triton.jit
def widen(stored, STORED: tl.constexpr):
    """Return as float32 what was loaded of a state; of a quantised one without its scale."""
    if STORED == "float8_e4m3fn":
        byte = stored.to(tl.int32)
        # The same bits lower down in a float32 stand for 2**-120 of the number, subnormals too.
        bits = ((byte & 0x80) << 24) | ((byte & 0x7F) << 20)
        value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
        return tl.where((byte & 0x7F) == 0x7F, float("nan"), value)
    elif STORED == "int8" or STORED == "int16":
        # 2.5 times as fast as the GPU's own conversion: the last bits of 1.5 * 2**23 count in ones.
        return (stored.to(tl.int32) + _ROUNDER_BITS).to(tl.float32, bitcast=True) - _ROUNDER
    else:
        return stored.to(tl.float32)


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
    elif STORED == "float8_e4m3fn":
        point, part = _below(value, 3, -6)
        # More than half of the way to the next grid point, or half of it from an odd one.
        return _stored(value, point + (part + (point & 1) > 1 << 23), STORED)
    elif STORED == "int16":
        return _nearest_integer(value, 32767.0).to(tl.int16)
    else:
        return _nearest_integer(value, 127.0).to(tl.int8)


@triton.jit
def _nearest_integer(value, LARGEST: tl.constexpr):
    """Return the integer nearest to a number below 2**22, cut off beyond the largest; 0 for NaN."""
    value = tl.where(value == value, value, 0.0)
    return tl.minimum(tl.maximum(value, -LARGEST), LARGEST) + _ROUNDER - _ROUNDER


@triton.jit
def round_stochastically(value, words, STORED: tl.constexpr):
    """Round up in magnitude with the chance that the way from the grid point below is of the whole step.

    ``words`` are uint32, of which the upper 24 bits count.
    """
    if STORED == "float16":
        point, part = _below(value, 10, -14)
    elif STORED == "bfloat16":
        point, part = _below(value, 7, -126)
    elif STORED == "float8_e4m3fn":
        point, part = _below(value, 3, -6)
    else:
        # Integers below 2**8 are the subnormal numbers of such a format.
        point, part = _below(value, 7, 7)
    return _stored(value, point + (part > (words >> 8).to(tl.int32)), STORED)


@triton.jit
def _below(value, MANTISSA: tl.constexpr, LEAST: tl.constexpr):
    """Return the grid point next below |value|, counted from zero, and how far |value| is beyond it.

    The grid is that of a float format with so many mantissa bits and this least exponent of its normal numbers. How
    far is in units of 2**-24 of the step to the next point, cut off.
    """
    magnitude = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    # Subnormal numbers have the exponent of the least normal ones, but not their leading bit.
    exponent = tl.maximum(magnitude >> _SIGNIFICAND_BITS, 1)
    significand = magnitude - ((exponent - 1) << _SIGNIFICAND_BITS)
    above = exponent - (LEAST + _EXPONENT_BIAS)
    dropped = _SIGNIFICAND_BITS - MANTISSA + tl.maximum(-above, 0)
    steps = (significand.to(tl.uint64) << 24) >> tl.minimum(dropped, 63).to(tl.uint64)
    point = (tl.maximum(above, 0) << MANTISSA) + (steps >> 24).to(tl.int32)
    return point, (steps & 0xFFFFFF).to(tl.int32)


@triton.jit
def _stored(value, point, STORED: tl.constexpr):
    """Return what is stored for a grid point with the sign of ``value``: at most the largest finite number's."""
    bits = value.to(tl.int32, bitcast=True)
    if STORED == "int8":
        point = tl.where((bits & 0x7FFFFFFF) > _INFINITY, 0, tl.minimum(point, 127))
        return tl.where(bits < 0, -point, point).to(tl.int8)
    elif STORED == "float8_e4m3fn":
        point = tl.where((bits & 0x7FFFFFFF) > _INFINITY, 0x7F, tl.minimum(point, 0x7E))
        return (((bits >> 24) & 0x80) | point).to(tl.int8)
    elif STORED == "float16":
        finite = (((bits >> 16) & 0x8000) | tl.minimum(point, 0x7BFF)).to(tl.int16).to(tl.float16, bitcast=True)
        return tl.where((bits & 0x7FFFFFFF) >= _INFINITY, value.to(tl.float16), finite)
    else:
        finite = (((bits >> 16) & 0x8000) | tl.minimum(point, 0x7F7F)).to(tl.int16).to(tl.bfloat16, bitcast=True)
        return tl.where((bits & 0x7FFFFFFF) >= _INFINITY, value.to(tl.bfloat16), finite)


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
        return tl.join(tl.join(a, c), tl.join(b, d)).reshape(channels.shape[0], BLOCK_N)


@triton.jit
def _philox(seed, block, token, last, ROUNDS: tl.constexpr):
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(seed, low, high, zero + tl.cast(token, tl.uint32), zero + last, ROUNDS)
