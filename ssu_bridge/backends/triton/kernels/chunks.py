"""The decays of a chunk's tokens, and the state after a chunk."""

import triton
import triton.language as tl

from ssu_bridge.backends.triton.kernels.common import time_step
from ssu_bridge.backends.triton.kernels.products import product

# Sums of decays are kept in two parts: a multiple of 1/1024, summed without an error, and what is left.
_STEPS = tl.constexpr(1024.0)
# 1.5 * 2**23: added to a number below 2**22 and taken away again, it leaves the nearest integer.
_ROUNDER = tl.constexpr(12582912.0)
# 2 to a power beyond this is 0 or infinite.
_MOST_EXPONENT = tl.constexpr(256.0)


@triton.jit
def exponents_of(raw_d, there, rate, bias, SOFTPLUS: tl.constexpr):
    """Return the exponents of a chunk's decays in two parts, and its time steps; of tokens that are not there zeros."""
    d = tl.where(there, time_step(raw_d.to(tl.float32), bias, SOFTPLUS), 0.0)
    coarse, fine = in_two(rate * d)
    return coarse, fine, d


@triton.jit
def in_two(exponent):
    """Return the exponents of tokens' decays as two numbers each, of which sums are exact but for the small ones'."""
    exponent = tl.where(
        exponent == exponent, tl.minimum(tl.maximum(exponent, -_MOST_EXPONENT), _MOST_EXPONENT), exponent
    )
    coarse = (exponent * _STEPS + _ROUNDER - _ROUNDER) / _STEPS
    return coarse, exponent - coarse


@triton.jit
def summed(coarse, fine, d):
    """Return the sums of the exponents up to each token, and d."""
    # d goes through, so that it is computed once, and not anew for every layout in which it is needed.
    return tl.associative_scan((coarse, fine, d), 0, sums)


@triton.jit
def sums(a, b, c, d, e, f):
    """Add the first two of three numbers, and take the third of the later ones."""
    return a + d, b + e, f


@triton.jit
def decayed(products, coarse, weighted, on_path, fine=None):
    """Return the weights of tokens [j] in the outputs of others [i], without ``fine`` but for the factor 2^fine [i].

    ``weighted`` is d / 2^fine. The coarse exponents are subtracted without an error, and 2^fine is near 1.
    """
    exponents = coarse[None, :] - coarse[:, None]
    if fine is not None:
        exponents += fine[None, :]
    weights = products * (tl.exp2(exponents) * weighted[:, None])
    return tl.where(on_path, weights, 0.0)


@triton.jit
def decays_after(coarse, fine, d, t, Q: tl.constexpr):
    """Return each token's weight in the state after a chunk, and the decay of the state before it."""
    last_coarse = tl.sum(tl.where(t == Q - 1, coarse, 0.0), 0)
    last_fine = tl.sum(tl.where(t == Q - 1, fine, 0.0), 0)
    return tl.exp2((last_coarse - coarse) + (last_fine - fine)) * d, tl.exp2(last_coarse + last_fine)


@triton.jit
def advanced(current, Xs, Bs, after, decay, ROUNDED: tl.constexpr, B_PARTS: tl.constexpr):
    """Return the state after a chunk. One that is ``ROUNDED`` is in bfloat16, and is rounded to that again."""
    added = tl.trans(Xs.to(tl.float32) * after[:, None])
    if ROUNDED:
        # What is cut off in these sums is far below the rounding to bfloat16, which comes next.
        return product(added, Bs, current.to(tl.float32) * decay, 3, B_PARTS)
    else:
        added = product(added, Bs, tl.zeros(current.shape, tl.float32), 3, B_PARTS)
        return tl.fma(current, decay, added)
