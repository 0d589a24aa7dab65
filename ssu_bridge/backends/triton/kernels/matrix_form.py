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

from ssu_bridge.backends.triton.kernels.chunks import advanced, decayed, decays_after, exponents_of, summed
from ssu_bridge.backends.triton.kernels.common import LOG2_E, checked, gated_output, inside, load, prefetch, slot_of
from ssu_bridge.backends.triton.kernels.decays import decays_at, first_of, size_of_chunk, size_of_decays
from ssu_bridge.backends.triton.kernels.many_tokens import at_first, rows_from, tokens_of
from ssu_bridge.backends.triton.kernels.products import mixed, product_of_exact, product_of_rows
from ssu_bridge.backends.triton.kernels.segments import (
    bounds_of,
    first_record,
    is_not_split,
    segment_at,
    start_of_segment,
)
from ssu_bridge.backends.triton.kernels.state_tile import source_of, state_in, store_state


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
    scratch,
    slots,
    tokens,
    sequences,
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
    SEGMENTS: tl.constexpr,
    LEAST: tl.constexpr,
    UNIT: tl.constexpr,
    RECORD: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    S_PARTS: tl.constexpr,
    X_PARTS: tl.constexpr,
    B_PARTS: tl.constexpr,
    C_PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Do what ``many_tokens`` does with the same arguments, in chunks of Q tokens; with ONE there is one chunk.

    With BLOCK the kernel ``decays`` has stored the decays, in blocks of as many tokens, and the loop over chunks reads
    ahead in STAGES. A thread holds W / 4 columns of the state side by side. PARTS are how many bfloat16 parts an
    operand has; what is computed on the way has three.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    # To mix columns takes time for each chunk, and to put the state in another order once.
    MIX: tl.constexpr = W if ONE else 0
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    sequence = (program // (H * blocks)).to(tl.int64)
    segment = tl.full((), 0, tl.int64)
    if SEGMENTS > 1:
        sequences -= 0 if cu_seqlens is None else 1
        if sequence >= sequences:
            sequence, segment = segment_at(
                sequence - sequences, cu_seqlens, cu_seqlens_stride, sequences, tokens, SEGMENTS, LEAST
            )
            segment += 1
    head = program // blocks % H
    first_row = program % blocks * BLOCK_P
    rows = first_row + tl.arange(0, BLOCK_P)
    row_mask = inside(rows, P, BLOCK_P)
    channels = head * P + rows

    first, length = tokens_of(cu_seqlens, cu_seqlens_stride, sequence, tokens)
    if ONE:
        length = tl.minimum(length, Q)
    begin, end = 0, length
    if SEGMENTS > 1:
        is_whole = is_not_split(
            sequence, length, cu_seqlens, cu_seqlens_stride, sequences, tokens, SEGMENTS, LEAST
        )  # fmt: skip
        begin, end = bounds_of(segment, length, is_whole, SEGMENTS, LEAST, UNIT)
    if begin >= end:
        return
    x = at_first(x, x_stride, x_token_stride, sequence, first)
    dt = at_first(dt, dt_stride, dt_token_stride, sequence, first)
    B = at_first(B, B_stride, B_token_stride, sequence, first)
    C = at_first(C, C_stride, C_token_stride, sequence, first)
    z = z if z is None else at_first(z, z_stride, z_token_stride, sequence, first)
    out = at_first(out, out_stride, out_token_stride, sequence, first)
    if parent_tokens is not None:
        parent_tokens = at_first(parent_tokens, parent_tokens_stride, parent_tokens_token_stride, sequence, first)

    sources = (
        state_batch_indices, state_batch_indices_stride, state_batch_indices_token_stride, num_accepted_tokens,
        num_accepted_tokens_stride, source_columns,
    )  # fmt: skip
    source = source_of(sources, sequence, slots, PAD)
    live = source >= 0
    if AHEAD:
        prefetch(
            program + AHEAD, tl.num_programs(0), state, state_batch_indices, state_stride, state_batch_indices_stride,
            slots, H * blocks, BLOCK_P * N, PAD,
        )  # fmt: skip
    wanted = live
    if has_initial_state is not None:
        wanted = live & (tl.load(has_initial_state + sequence * has_initial_state_stride) != 0)
    place = (head, first_row, 0)
    decays = None
    if BLOCK:
        decays = first_of(scratch, sequence, head, tokens, H, BLOCK)
        if SEGMENTS > 1:
            scratch += size_of_decays(sequences, tokens, H, BLOCK)
    if SEGMENTS > 1 and ((begin > 0) | (end < length)):
        record = first_record(sequence, first, cu_seqlens, sequences, tokens, SEGMENTS, LEAST)
        record = record * (H * blocks) + program % (H * blocks)
        current = mixed(start_of_segment(scratch, record, segment, H * blocks, BLOCK_P, BLOCK_N, RECORD), MIX)
    else:
        source_scale = state_scale if state_scale is None else state_scale + source * state_scale_stride
        current = state_in(
            state + source * state_stride, source_scale, wanted, place, channels, row_mask, P, N, BLOCK_P, BLOCK_N,
            STORED, WARPS, W, MIX, S_PARTS == 1,
        )  # fmt: skip

    bias = dt_bias if dt_bias is None else tl.load(dt_bias + head).to(tl.float32)
    rate = tl.load(A + head).to(tl.float32) * LOG2_E
    skip = D if D is None else (tl.load(D + head).to(tl.float32) if TIED_D else D + channels)
    group = head // (H // G) * N
    parameters = (rate, channels, row_mask, sequences)
    dt, B, C = dt + head, B + group, C + group
    arrays = (x, dt, B, C, out)
    strides = (x_token_stride, dt_token_stride, B_token_stride, C_token_stride, out_token_stride)
    if ONE:
        current = _chunk(
            current, 0, length, arrays, strides, parameters, bias, decays, skip, z, z_token_stride, parent_tokens,
            parent_tokens_token_stride, TIED_D, N, BLOCK_P, BLOCK_N, SOFTPLUS, MIX, Q, S_PARTS, X_PARTS,
            B_PARTS, C_PARTS,
        )  # fmt: skip
    elif intermediate_states is None:
        for token in tl.range(begin, end, Q, num_stages=STAGES):
            current = _chunk(
                current, token, end, arrays, strides, parameters, bias, decays, skip, z, z_token_stride, parent_tokens,
                parent_tokens_token_stride, TIED_D, N, BLOCK_P, BLOCK_N, SOFTPLUS, MIX, Q, S_PARTS, X_PARTS,
                B_PARTS, C_PARTS,
            )  # fmt: skip
    else:
        entry = source
        if intermediate_state_indices is not None:
            entry = tl.load(intermediate_state_indices + sequence * intermediate_state_indices_stride).to(tl.int64)
        entry = checked(entry, entries, -1)
        for start in range(begin, end, INTERMEDIATE_STRIDE):
            after = start + INTERMEDIATE_STRIDE
            stop = tl.minimum(after, end)
            for token in range(start, stop, Q):
                current = _chunk(
                    current, token, stop, arrays, strides, parameters, bias, decays, skip, z, z_token_stride,
                    parent_tokens, parent_tokens_token_stride, TIED_D, N, BLOCK_P, BLOCK_N, SOFTPLUS, MIX, Q,
                    S_PARTS, X_PARTS, B_PARTS, C_PARTS,
                )  # fmt: skip
            step = tl.cast(start // INTERMEDIATE_STRIDE, tl.int64)
            scale = intermediate_state_scales
            if scale is not None:
                scale = scale + entry * intermediate_state_scales_stride + step * (H * P)
            store_state(
                current, intermediate_states + entry * intermediate_states_stride + step * (H * P * N), scale,
                live & (entry >= 0) & (step < steps) & (after <= length), place, channels, row_mask,
                rand_seed if rand_seed is None else tl.load(rand_seed),
                entry * (H * P * N), after - 1, 1, P, N, BLOCK_P, BLOCK_N, STORED, ROUNDS, WARPS, W, MIX,
            )  # fmt: skip

    if STORE_STATE:
        if not ONE:
            # Read again, so that in between no registers are needed for what depends on it.
            source = source_of(sources, sequence, slots, PAD)
        target = source
        if dst_state_batch_indices is not None:
            target = slot_of(dst_state_batch_indices, dst_state_batch_indices_stride, sequence, slots, PAD)
        scale = state_scale if state_scale is None else state_scale + target * state_scale_stride
        store_state(
            current, state + target * state_stride, scale,
            (source >= 0) & (target >= 0) & (end == length), place, channels, row_mask,
            rand_seed if rand_seed is None else tl.load(rand_seed),
            target * (H * P * N), length - 1, 0, P, N, BLOCK_P, BLOCK_N, STORED, ROUNDS, WARPS, W, MIX,
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
    decays,
    skip,
    z,
    z_token_stride,
    parent_tokens,
    parent_tokens_token_stride,
    TIED_D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    MIX: tl.constexpr,
    Q: tl.constexpr,
    S_PARTS: tl.constexpr,
    X_PARTS: tl.constexpr,
    B_PARTS: tl.constexpr,
    C_PARTS: tl.constexpr,
):
    """Write the outputs of the tokens from ``token`` to before ``end``, at most Q, and return the state after them."""
    x, dt, B, C, out = arrays
    x_token_stride, dt_token_stride, B_token_stride, C_token_stride, out_token_stride = strides
    rate, channels, row_mask, sequences = parameters
    t = tl.arange(0, Q)
    there = token + t < end
    at = token + t.to(tl.int64)
    mask = there[:, None] & row_mask[None, :]
    if decays is None:
        raw_d = tl.load(dt + at * dt_token_stride, mask=there, other=0.0)
    Xs = tl.load(rows_from(x, token, x_token_stride, Q) + channels[None, :], mask=mask, other=0.0)
    columns = tl.arange(0, BLOCK_N)
    columns_mask = there[:, None] & inside(columns, N, BLOCK_N)[None, :]
    Bs = tl.load(rows_from(B, token, B_token_stride, Q) + columns[None, :], mask=columns_mask, other=0.0)
    Cs = tl.load(rows_from(C, token, C_token_stride, Q) + columns[None, :], mask=columns_mask, other=0.0)

    on_path = t[:, None] <= t[None, :]
    if decays is not None:
        numbers = decays_at(decays, token)
        coarse, fine, weighted = tl.load(numbers + t), tl.load(numbers + Q + t), tl.load(numbers + 2 * Q + t)
        decay = tl.load(numbers + 4 * Q + t)
    else:
        coarse, fine, d = exponents_of(raw_d, there, rate, bias, SOFTPLUS)
        if parent_tokens is None:
            coarse, fine, d = summed(coarse, fine, d)
        else:
            on_path = _paths(parent_tokens, at, there, t, parent_tokens_token_stride, Q)
            coarse = tl.sum(tl.where(on_path, coarse[:, None], 0.0), 0)
            fine = tl.sum(tl.where(on_path, fine[:, None], 0.0), 0)
    weights = product_of_rows(Bs, Cs, B_PARTS, C_PARTS)
    if decays is None:
        # After this product, so that the compiler has the state loaded before B and C, and not after them.
        weighted, decay = tl.div_rn(d, tl.exp2(fine)), tl.exp2(coarse + fine)
    weights = decayed(weights, coarse, weighted, on_path, fine)
    before = product_of_rows(current, mixed(Cs, MIX), S_PARTS, C_PARTS)
    y = product_of_exact(tl.trans(Xs), weights, X_PARTS)
    y = tl.trans(tl.fma(before, decay[None, :], y))
    if skip is not None:
        # Added here: as a part of the weights an infinite D would make NaN of the zeros next to it.
        if z is None or (decays is None and parent_tokens is None):
            skip = skip if TIED_D else load(skip, row_mask)[None, :]
            y = tl.fma(Xs.to(tl.float32), tl.broadcast_to(skip, y.shape), y)
        elif sequences > 0:
            # Always so, but the compiler moves nothing across a branch: z takes no registers while the products do.
            y += Xs.to(tl.float32) * (skip if TIED_D else load(skip, row_mask)[None, :])
    if z is not None:
        y = gated_output(y, 0.0, None, load(rows_from(z, token, z_token_stride, Q) + channels[None, :], mask))
    tl.store(rows_from(out, token, out_token_stride, Q) + channels[None, :], y.to(out.dtype.element_ty), mask=mask)

    if parent_tokens is None:
        if decays is not None:
            after, last = tl.load(numbers + 3 * Q + t), tl.load(numbers + size_of_chunk(Q) - 1)
        else:
            after, last = decays_after(coarse, fine, d, t, Q)
        current = advanced(current, Xs, mixed(Bs, MIX), after, last, S_PARTS == 1, B_PARTS)
    return current


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
