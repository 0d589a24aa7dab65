"""The decays of all chunks of long sequences, computed side by side before the states need them.

Summing decays up is a chain of short steps, which takes a program that keeps a state about as long as the products of a
chunk. Here programs do it for blocks of chunks, and store five numbers for each token and head in scratch memory.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from ssu_bridge.backends.triton.kernels.chunks import exponents_of, sums
from ssu_bridge.backends.triton.kernels.common import LOG2_E
from ssu_bridge.backends.triton.kernels.many_tokens import at_first

# What is stored of a token and head.
_NUMBERS = tl.constexpr(5)


@triton.jit
def decays(
    dt,
    A,
    dt_bias,
    scratch,
    tokens,
    dt_stride,
    dt_token_stride,
    H: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Store the decays of a block of BLOCK tokens of a sequence and head; arguments as for ``matrix_form``."""
    if OVERLAP:
        # The next kernel is launched when this one ends: to launch it before was not faster.
        gdc_wait()
    program = tl.program_id(0).to(tl.int64)
    blocks = tokens // BLOCK + 1
    head = program % H
    sequence, block = program // H // blocks, program // H % blocks
    chunks: tl.constexpr = BLOCK // Q
    place = tl.arange(0, chunks)[:, None] * Q + tl.arange(0, Q)[None, :]
    token = block * BLOCK + place
    there = token < tokens
    dt = at_first(dt, dt_stride, dt_token_stride, sequence, 0) + head
    raw_d = tl.load(dt + token * dt_token_stride, mask=there, other=0.0)
    rate = tl.load(A + head).to(tl.float32) * LOG2_E
    bias = dt_bias if dt_bias is None else tl.load(dt_bias + head).to(tl.float32)
    coarse, fine, d = exponents_of(raw_d, there, rate, bias, SOFTPLUS)
    coarse, fine, d = tl.associative_scan((coarse, fine, d), 1, sums)
    is_last = tl.arange(0, Q)[None, :] == Q - 1
    last_coarse = tl.sum(tl.where(is_last, coarse, 0.0), 1)[:, None]
    last_fine = tl.sum(tl.where(is_last, fine, 0.0), 1)[:, None]
    to = first_of(scratch, sequence, head, tokens, H, BLOCK) + block * (_NUMBERS * BLOCK)
    to += tl.arange(0, chunks)[:, None] * size_of_chunk(Q) + tl.arange(0, Q)[None, :]
    tl.store(to, coarse)
    tl.store(to + Q, fine)
    tl.store(to + 2 * Q, tl.div_rn(d, tl.exp2(fine)))
    tl.store(to + 3 * Q, tl.exp2((last_coarse - coarse) + (last_fine - fine)) * d)
    tl.store(to + 4 * Q, tl.exp2(coarse + fine))


@triton.jit
def first_of(scratch, sequence, head, tokens, H: tl.constexpr, BLOCK: tl.constexpr):
    """Return where what is stored of a sequence and head begins."""
    return scratch + (sequence * H + head) * (tokens // BLOCK + 1) * (_NUMBERS * BLOCK)


@triton.jit
def size_of_decays(sequences, tokens, H: tl.constexpr, BLOCK: tl.constexpr):
    """Return how many numbers all decays are."""
    return sequences * (tokens // BLOCK + 1) * (H * _NUMBERS * BLOCK)


@triton.jit
def size_of_chunk(Q: tl.constexpr):
    """Return how many numbers are stored of a chunk."""
    return _NUMBERS * Q


@triton.jit
def decays_at(first, token):
    """Return where what is stored of the chunk that begins with a token is; ``first`` is that of its sequence and head.

    In rows of Q: the exponents of the decays up to each token in its chunk, coarse and fine; the time steps over 2 to
    the fine ones; each token's weight in the state after the chunk; and the decays of the state before the chunk.
    """
    return first + tl.cast(token, tl.int64) * _NUMBERS
