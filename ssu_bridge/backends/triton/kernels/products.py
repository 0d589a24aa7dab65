"""Products of matrices on tensor cores, and where the elements of their operands lie in the threads' registers.

Tensor cores take operands of 16 bits, and sum in float32: a float32 operand is cut into bfloat16 parts of 8 bits each,
of which three are all of it.
"""

import triton
import triton.language as tl

from ssu_bridge.backends.triton.kernels.common import inside

_UPPER_HALF = tl.constexpr(-65536)


@triton.jit
def product(a, b, acc, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr):
    """Return acc + a @ b, without the products of parts that are below 2**-24 of it, or 2**-32 where all are float32.

    Tensor cores cut off what does not fit beside the sum so far, and so the smallest products come first.
    """
    a_parts, b_parts = _parts(a, A_PARTS), _parts(b, B_PARTS)
    most: tl.constexpr = 3 if A_PARTS + B_PARTS == 6 else 2
    for smaller in tl.static_range(most, -1, -1):
        for i in tl.static_range(len(a_parts)):
            for j in tl.static_range(len(b_parts)):
                if i + j == smaller:
                    acc = tl.dot(a_parts[i], b_parts[j], acc)
    return acc


@triton.jit
def product_of_rows(a, b, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr):
    """Return a @ trans(b). Of float32 operands, tensor cores sum over quarters of the columns, as they cut sums off."""
    if a.dtype == tl.float16 and b.dtype == tl.float16:
        return tl.dot(a, tl.trans(b), tl.zeros((a.shape[0], b.shape[0]), tl.float32))
    elif A_PARTS + B_PARTS == 6 and a.shape[1] >= 64:
        a_left, a_right = _halves(a)
        b_left, b_right = _halves(b)
        return _sum_of_halves(a_left, b_left, A_PARTS, B_PARTS) + _sum_of_halves(a_right, b_right, A_PARTS, B_PARTS)
    else:
        return product(a, tl.trans(b), tl.zeros((a.shape[0], b.shape[0]), tl.float32), A_PARTS, B_PARTS)


@triton.jit
def product_of_exact(a, b, A_PARTS: tl.constexpr):
    """Return a @ b for a float32 b. If a has one part, b's three are the columns of one product.

    No product then waits for the one before, and nothing is cut off where the sums of the parts are added.
    """
    M: tl.constexpr = a.shape[0]
    N: tl.constexpr = b.shape[1]
    if A_PARTS == 1:
        high, middle, low = _parts(b, 3)
        both = tl.join(tl.join(low, tl.zeros(low.shape, low.dtype)), tl.join(high, middle))
        both = both.permute(0, 2, 3, 1).reshape(b.shape[0], 4 * N)
        sums = tl.dot(a, both, tl.zeros((M, 4 * N), tl.float32)).reshape(M, 2, 2, N).permute(0, 3, 1, 2)
        first, second = tl.split(sums)
        low, _ = tl.split(first)
        high, middle = tl.split(second)
        return (low + middle) + high
    else:
        return product(a, b, tl.zeros((M, N), tl.float32), A_PARTS, 3)


@triton.jit
def _sum_of_halves(a, b, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr):
    a_left, a_right = _halves(a)
    b_left, b_right = _halves(b)
    zeros = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
    left = product(a_left, tl.trans(b_left), zeros, A_PARTS, B_PARTS)
    return left + product(a_right, tl.trans(b_right), zeros, A_PARTS, B_PARTS)


@triton.jit
def _halves(t):
    """Return the left and the right half of a matrix's columns."""
    return tl.split(t.reshape(t.shape[0], 2, t.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def _parts(value, PARTS: tl.constexpr):
    """Return a number as a sum of bfloat16 parts, largest first."""
    if PARTS == 1:
        return (value.to(tl.bfloat16),)
    elif PARTS == 2:
        high, rest = _cut(value)
        return high, rest.to(tl.bfloat16)
    else:
        high, rest = _cut(value)
        middle, rest = _cut(rest)
        return high, middle, rest.to(tl.bfloat16)


@triton.jit
def _cut(value):
    """Return the bfloat16 that a number begins with, and what is left of it, as float32."""
    value = value.to(tl.float32)
    bits = value.to(tl.int32, bitcast=True)
    high = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return high, value - (bits & _UPPER_HALF).to(tl.float32, bitcast=True)


@triton.jit
def tile_of(
    place,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WARPS: tl.constexpr,
    W: tl.constexpr,
):
    """Return where the elements of a tile of the state are, [rows, columns / W, W], and a mask.

    ``place`` is the head, the first row and the first column. Four threads of a warp take a row's W columns, the others
    seven more rows, and the warps take turns of 8 rows. A warp's part of a product's operand is two such turns.
    """
    head, first_row, first_column = place
    turn = tl.arange(0, BLOCK_P)
    together: tl.constexpr = 16 * WARPS
    rows = first_row + turn % 8 + turn // 8 % WARPS * 16 + turn // (8 * WARPS) % 2 * 8 + turn // together * together
    columns = first_column + tl.arange(0, BLOCK_N // W)[:, None] * W + tl.arange(0, W)[None, :]
    tile = head.to(tl.int64) * (P * N) + (rows[:, None, None] * N + columns[None, :, :])
    mask = inside(rows, P, BLOCK_P)[:, None, None]
    if N % BLOCK_N:
        mask = mask & (columns < N)[None, :, :]
    return tile, mask


@triton.jit
def in_rows(t, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, W: tl.constexpr):
    """Return a tensor that was loaded from such a tile as [rows, columns]."""
    REPEATS: tl.constexpr = BLOCK_P // (16 * WARPS)
    t = t.reshape(REPEATS, 2, WARPS, 8, BLOCK_N // W, W).permute(0, 2, 1, 3, 4, 5)
    return t.reshape(BLOCK_P, BLOCK_N)


@triton.jit
def in_turns(t, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, W: tl.constexpr):
    """Undo ``in_rows``."""
    REPEATS: tl.constexpr = BLOCK_P // (16 * WARPS)
    t = t.reshape(REPEATS, WARPS, 2, 8, BLOCK_N // W, W).permute(0, 2, 1, 3, 4, 5)
    return t.reshape(BLOCK_P, BLOCK_N // W, W)


@triton.jit
def groups_of(t):
    """Return the groups of a tile's columns, [rows, groups, columns of a group], one by one."""
    if t.shape[1] == 1:
        return (t.reshape(t.shape[0], t.shape[2]),)
    else:
        left, right = tl.split(t.reshape(t.shape[0], 2, t.shape[1] // 2, t.shape[2]).permute(0, 2, 3, 1))
        return groups_of(left) + groups_of(right)


@triton.jit
def mixed(t, W: tl.constexpr):
    """Return columns in the order in which threads that hold W / 4 side by side hold those of a product's operand."""
    if W <= 8:
        return t
    else:
        ROWS: tl.constexpr = t.shape[0]
        return t.reshape(ROWS, t.shape[1] // W, 4, W // 8, 2).permute(0, 1, 3, 2, 4).reshape(ROWS, t.shape[1])


@triton.jit
def unmixed(t, W: tl.constexpr):
    """Undo ``mixed``."""
    if W <= 8:
        return t
    else:
        ROWS: tl.constexpr = t.shape[0]
        return t.reshape(ROWS, t.shape[1] // W, W // 8, 4, 2).permute(0, 1, 3, 2, 4).reshape(ROWS, t.shape[1])
