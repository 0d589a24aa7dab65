"""Tokens of a sequence in chunks, by matrix products: a program keeps a block of rows (headdim) of one head's state.

With the decays a of a chunk's tokens, summed up to s, the outputs and the state after the chunk are

    y[i] = 2^s[i] (state . C[i]) + sum over j <= i of 2^(s[i] - s[j]) d[j] (B[j] . C[i]) x[j]
    state = 2^s[last] state + sum over j of 2^(s[last] - s[j]) d[j] x[j] B[j]

in which everything but the decays is a product of matrices. In a tree of drafts j runs over the path to i. A and dt
are tied to the head.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ssu_bridge.backends.triton.kernels.common import (
    LOG2_E,
    by_row,
    checked,
    gated_output,
    inside,
    load,
    slot_of,
    time_step,
)
from ssu_bridge.backends.triton.kernels.many_tokens import at_first, rounded, tokens_of
from ssu_bridge.backends.triton.kernels.products import in_rows, in_turns, mixed, product, tile_of, unmixed
from ssu_bridge.backends.triton.kernels.rounding import widen

# Sums of decays are kept in two parts: a multiple of 1/1024, summed without an error, and what is left.
_STEPS = tl.constexpr(1024.0)
# 1.5 * 2**23: added to a number below 2**22 and taken away again, it leaves the nearest integer.
_ROUNDER = tl.constexpr(12582912.0)
# 2 to a power beyond this is 0 or infinite.
_MOST_EXPONENT = tl.constexpr(256.0)


@triton.jit
def matrix_form(
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
    num_accepted_tokens,
    cu_seqlens,
    intermediate_states,
    intermediate_state_indices,
    state_scale,
    intermediate_state_scales,
    rand_seed,
    has_initial_state,
    parent_tokens,
    out,
    slots,
    tokens,
    source_columns,
    entries,
    steps,
    state_stride,
    x_stride,
    dt_stride,
    B_stride,
    C_stride,
    z_stride,
    state_batch_indices_stride,
    dst_state_batch_indices_stride,
    num_accepted_tokens_stride,
    cu_seqlens_stride,
    intermediate_states_stride,
    intermediate_state_indices_stride,
    state_scale_stride,
    intermediate_state_scales_stride,
    has_initial_state_stride,
    parent_tokens_stride,
    out_stride,
    x_token_stride,
    dt_token_stride,
    B_token_stride,
    C_token_stride,
    z_token_stride,
    parent_tokens_token_stride,
    state_batch_indices_token_stride,
    out_token_stride,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    TIED_D: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PAD: tl.constexpr,
    STORED: tl.constexpr,
    STORE_STATE: tl.constexpr,
    ROUNDS: tl.constexpr,
    INTERMEDIATE_STRIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WARPS: tl.constexpr,
    W: tl.constexpr,
    Q: tl.constexpr,
    ONE: tl.constexpr,
    S_PARTS: tl.constexpr,
    X_PARTS: tl.constexpr,
    B_PARTS: tl.constexpr,
    C_PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Do what ``many_tokens`` does with the same arguments, in chunks of Q tokens; with ONE there is one chunk.

    A thread holds W / 4 columns of the state side by side. PARTS are how many bfloat16 parts an operand has; what is
    computed on the way has three.
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

    first, length = tokens_of(cu_seqlens, cu_seqlens_stride, sequence, tokens)
    if ONE:
        length = tl.minimum(length, Q)
    if length <= 0:
        return
    x = at_first(x, x_stride, x_token_stride, sequence, first)
    dt = at_first(dt, dt_stride, dt_token_stride, sequence, first)
    B = at_first(B, B_stride, B_token_stride, sequence, first)
    C = at_first(C, C_stride, C_token_stride, sequence, first)
    z = z if z is None else at_first(z, z_stride, z_token_stride, sequence, first)
    out = at_first(out, out_stride, out_token_stride, sequence, first)
    if parent_tokens is not None:
        parent_tokens = at_first(parent_tokens, parent_tokens_stride, parent_tokens_token_stride, sequence, first)

    sources = state_batch_indices
    if num_accepted_tokens is not None:
        accepted = tl.load(num_accepted_tokens + sequence * num_accepted_tokens_stride).to(tl.int64)
        column = tl.minimum(tl.maximum(accepted, 1), source_columns) - 1
        sources += column * state_batch_indices_token_stride
    source = slot_of(sources, state_batch_indices_stride, sequence, slots, PAD)
    live = source >= 0
    wanted = live
    if has_initial_state is not None:
        wanted = live & (tl.load(has_initial_state + sequence * has_initial_state_stride) != 0)
    place = (head, first_row, 0)
    threads_tile, threads_mask = tile_of(place, P, N, BLOCK_P, BLOCK_N, WARPS, W)
    current = tl.load(state + source * state_stride + threads_tile, mask=threads_mask & wanted, other=0)
    current = mixed(in_rows(current, BLOCK_P, BLOCK_N, WARPS, W), W)
    if S_PARTS > 1:
        current = widen(current, STORED)
    if state_scale is not None:
        current *= load(state_scale + source * state_scale_stride + channels, row_mask & wanted)[:, None]

    bias = dt_bias if dt_bias is None else tl.load(dt_bias + head).to(tl.float32)
    skip = D if D is None else by_row(D, head, rows, row_mask, P, TIED_D)
    rate = tl.load(A + head).to(tl.float32) * LOG2_E
    group = head // (H // G) * N
    parameters = (rate, row_mask)
    x, dt, B, C, out = x + channels, dt + head, B + group, C + group, out + channels
    z = z if z is None else z + channels
    arrays = (x, dt, B, C, out)
    strides = (x_token_stride, dt_token_stride, B_token_stride, C_token_stride, out_token_stride)
    if ONE:
        current = _chunk(
            current, 0, length, arrays, strides, parameters, bias, skip, z, z_token_stride, parent_tokens,
            parent_tokens_token_stride, N, BLOCK_P, BLOCK_N, SOFTPLUS, W, Q, S_PARTS, X_PARTS, B_PARTS, C_PARTS,
        )  # fmt: skip
    elif intermediate_states is None:
        for token in range(0, length, Q):
            current = _chunk(
                current, token, length, arrays, strides, parameters, bias, skip, z, z_token_stride, parent_tokens,
                parent_tokens_token_stride, N, BLOCK_P, BLOCK_N, SOFTPLUS, W, Q, S_PARTS, X_PARTS, B_PARTS, C_PARTS,
            )  # fmt: skip
    else:
        entry = source
        if intermediate_state_indices is not None:
            entry = tl.load(intermediate_state_indices + sequence * intermediate_state_indices_stride).to(tl.int64)
        entry = checked(entry, entries, -1)
        for begin in range(0, length, INTERMEDIATE_STRIDE):
            end = tl.minimum(begin + INTERMEDIATE_STRIDE, length)
            for token in range(begin, end, Q):
                current = _chunk(
                    current, token, end, arrays, strides, parameters, bias, skip, z, z_token_stride, parent_tokens,
                    parent_tokens_token_stride, N, BLOCK_P, BLOCK_N, SOFTPLUS, W, Q, S_PARTS, X_PARTS, B_PARTS, C_PARTS,
                )  # fmt: skip
            after = begin + INTERMEDIATE_STRIDE
            step = tl.cast(begin // INTERMEDIATE_STRIDE, tl.int64)
            scale = intermediate_state_scales
            if scale is not None:
                scale = scale + entry * intermediate_state_scales_stride + step * (H * P)
            _store(
                current, intermediate_states + entry * intermediate_states_stride + step * (H * P * N), scale,
                live & (entry >= 0) & (step < steps) & (after <= length), place, channels, row_mask,
                rand_seed if rand_seed is None else tl.load(rand_seed),
                entry * (H * P * N), after - 1, 1, P, N, BLOCK_P, BLOCK_N, STORED, ROUNDS, WARPS, W,
            )  # fmt: skip

    if STORE_STATE:
        target = source
        if dst_state_batch_indices is not None:
            target = slot_of(dst_state_batch_indices, dst_state_batch_indices_stride, sequence, slots, PAD)
        scale = state_scale if state_scale is None else state_scale + target * state_scale_stride
        _store(
            current, state + target * state_stride, scale, live & (target >= 0), place, channels, row_mask,
            rand_seed if rand_seed is None else tl.load(rand_seed),
            target * (H * P * N), length - 1, 0, P, N, BLOCK_P, BLOCK_N, STORED, ROUNDS, WARPS, W,
        )  # fmt: skip


@triton.jit
def _chunk(
    current,
    token,
    end,
    arrays,
    strides,
    parameters,
    bias,
    skip,
    z,
    z_token_stride,
    parent_tokens,
    parent_tokens_token_stride,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    W: tl.constexpr,
    Q: tl.constexpr,
    S_PARTS: tl.constexpr,
    X_PARTS: tl.constexpr,
    B_PARTS: tl.constexpr,
    C_PARTS: tl.constexpr,
):
    """Write the outputs of the tokens from ``token`` to before ``end``, at most Q, and return the state after them."""
    x, dt, B, C, out = arrays
    x_token_stride, dt_token_stride, B_token_stride, C_token_stride, out_token_stride = strides
    rate, row_mask = parameters
    t = tl.arange(0, Q)
    there = token + t < end
    at = token + t.to(tl.int64)
    mask = there[:, None] & row_mask[None, :]
    raw_d = tl.load(dt + at * dt_token_stride, mask=there, other=0.0)
    Xs = tl.load(x[None, :] + at[:, None] * x_token_stride, mask=mask, other=0.0)
    columns = tl.arange(0, BLOCK_N)
    columns_mask = there[:, None] & inside(columns, N, BLOCK_N)[None, :]
    Bs = tl.load(B + at[:, None] * B_token_stride + columns[None, :], mask=columns_mask, other=0.0)
    Cs = tl.load(C + at[:, None] * C_token_stride + columns[None, :], mask=columns_mask, other=0.0)

    d = tl.where(there, time_step(raw_d.to(tl.float32), bias, SOFTPLUS), 0.0)
    coarse, fine = in_two(rate * d)
    if parent_tokens is None:
        # d goes through, so that it is computed once, and not anew for every layout in which it is needed.
        coarse, fine, d = tl.associative_scan((coarse, fine, d), 0, sums)
        on_path = t[:, None] <= t[None, :]
    else:
        on_path = _paths(parent_tokens, at, there, t, parent_tokens_token_stride, Q)
        coarse = tl.sum(tl.where(on_path, coarse[:, None], 0.0), 0)
        fine = tl.sum(tl.where(on_path, fine[:, None], 0.0), 0)
    up = tl.exp2(fine)
    weights = product(Bs, tl.trans(Cs), tl.zeros((Q, Q), tl.float32), B_PARTS, C_PARTS)
    weights = decayed(weights, coarse, up, d, on_path)
    zeros = tl.zeros((BLOCK_P, Q), tl.float32)
    y = product(tl.trans(Xs), weights, zeros, X_PARTS, 3)
    before = product(current, tl.trans(mixed(Cs, W)), zeros, S_PARTS, C_PARTS)
    y = tl.fma(before, tl.exp2(coarse)[None, :], y) * up[None, :]

    y = tl.trans(y)
    if skip is not None:
        y += Xs.to(tl.float32) * (skip if len(skip.shape) == 0 else skip[None, :])
    if z is not None:
        y = gated_output(y, 0.0, None, load(z[None, :] + at[:, None] * z_token_stride, mask))
    tl.store(out[None, :] + at[:, None] * out_token_stride, y.to(out.dtype.element_ty), mask=mask)

    if parent_tokens is None:
        last_coarse = tl.sum(tl.where(t == Q - 1, coarse, 0.0), 0)
        last_fine = tl.sum(tl.where(t == Q - 1, fine, 0.0), 0)
        after = tl.exp2((last_coarse - coarse) + (last_fine - fine)) * d
        added = Xs.to(tl.float32) * after[:, None]
        decay = tl.exp2(last_coarse + last_fine)
        if S_PARTS == 1:
            # What is cut off in these sums is far below the rounding to bfloat16, which comes next.
            current = product(tl.trans(added), mixed(Bs, W), current.to(tl.float32) * decay, 3, B_PARTS)
        else:
            zeros = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
            added = product(tl.trans(added), mixed(Bs, W), zeros, 3, B_PARTS)
            current = tl.fma(current, decay, added)
    return current


@triton.jit
def in_two(exponent):
    """Return the exponents of tokens' decays as two numbers each, of which sums are exact but for the small ones'."""
    exponent = tl.where(
        exponent == exponent, tl.minimum(tl.maximum(exponent, -_MOST_EXPONENT), _MOST_EXPONENT), exponent
    )
    coarse = (exponent * _STEPS + _ROUNDER - _ROUNDER) / _STEPS
    return coarse, exponent - coarse


@triton.jit
def decayed(products, coarse, up, d, on_path):
    """Return the weights of tokens [j] in the outputs of others [i], but for the factor ``up`` [i].

    ``coarse`` and ``up`` are of the sums of exponents: 2^fine is near 1, and taken out of the matrix of decays.
    """
    weights = products * (tl.exp2(coarse[None, :] - coarse[:, None]) * tl.div_rn(d, up)[:, None])
    return tl.where(on_path, weights, 0.0)


@triton.jit
def sums(a, b, c, d, e, f):
    """Add the first two of three numbers, and take the third of the later ones."""
    return a + d, b + e, f


@triton.jit
def _paths(parent_tokens, at, there, t, stride, Q: tl.constexpr):
    """Return [j, i]: whether token j is on the path to token i, which ends with i itself."""
    parents = tl.load(parent_tokens + at * stride, mask=there, other=-1).to(tl.int64)
    parents = tl.where((parents >= 0) & (parents < t), parents, -1)
    reached = ((t[:, None] == t[None, :]) | (t[:, None] == parents[None, :])).to(tl.float32)
    # Each time the paths that are known become twice as long.
    length: tl.constexpr = Q
    for i in tl.static_range(6):
        if (1 << i) < length:
            reached = tl.minimum(tl.dot(reached.to(tl.bfloat16), reached.to(tl.bfloat16)), 1.0)
    return reached > 0.5


@triton.jit
def _store(
    current,
    values,
    scale,
    wanted,
    place,
    channels,
    row_mask,
    seed,
    first,
    token,
    last,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STORED: tl.constexpr,
    ROUNDS: tl.constexpr,
    WARPS: tl.constexpr,
    W: tl.constexpr,
):
    """Round a state to what is stored and store it, as ``many_tokens`` does with the same arguments."""
    stored = rounded(
        unmixed(current, W), scale, wanted, channels, row_mask, seed, first, token, last, N, BLOCK_N, STORED, ROUNDS
    )
    tile, mask = tile_of(place, P, N, BLOCK_P, BLOCK_N, WARPS, W)
    tl.store(values + tile, in_turns(stored, BLOCK_P, BLOCK_N, WARPS, W), mask=mask & wanted)
