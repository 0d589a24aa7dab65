"""The states after the segments of long sequences, each computed without those before it."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ssu_bridge.backends.triton.kernels.chunks import advanced, decays_after, exponents_of, summed
from ssu_bridge.backends.triton.kernels.common import LOG2_E, inside
from ssu_bridge.backends.triton.kernels.decays import decays_at, first_of, size_of_chunk, size_of_decays
from ssu_bridge.backends.triton.kernels.many_tokens import at_first, rows_from, tokens_of
from ssu_bridge.backends.triton.kernels.segments import bounds_of, is_not_split, segment_at
from ssu_bridge.backends.triton.kernels.state_tile import source_of, state_in


@triton.jit
def segment_states(
    state,
    x,
    dt,
    A,
    B,
    dt_bias,
    state_batch_indices,
    num_accepted_tokens,
    cu_seqlens,
    state_scale,
    has_initial_state,
    scratch,
    slots,
    tokens,
    sequences,
    source_columns,
    state_stride,
    x_stride,
    dt_stride,
    B_stride,
    state_batch_indices_stride,
    num_accepted_tokens_stride,
    cu_seqlens_stride,
    state_scale_stride,
    has_initial_state_stride,
    x_token_stride,
    dt_token_stride,
    B_token_stride,
    state_batch_indices_token_stride,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PAD: tl.constexpr,
    STORED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WARPS: tl.constexpr,
    W: tl.constexpr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
    B_PARTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LEAST: tl.constexpr,
    UNIT: tl.constexpr,
    RECORD: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Store the record of a segment that is not the last of its sequence; arguments as for ``matrix_form``."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0).to(tl.int64)
    sequences -= 0 if cu_seqlens is None else 1
    sequence, segment = segment_at(
        program // (H * blocks), cu_seqlens, cu_seqlens_stride, sequences, tokens, SEGMENTS, LEAST
    )
    head = (program // blocks % H).to(tl.int32)
    first_row = (program % blocks).to(tl.int32) * BLOCK_P
    rows = first_row + tl.arange(0, BLOCK_P)
    row_mask = inside(rows, P, BLOCK_P)
    channels = head * P + rows

    first, length = tokens_of(cu_seqlens, cu_seqlens_stride, sequence, tokens)
    is_whole = is_not_split(sequence, length, cu_seqlens, cu_seqlens_stride, sequences, tokens, SEGMENTS, LEAST)
    begin, end = bounds_of(segment, length, is_whole, SEGMENTS, LEAST, UNIT)
    if end >= length:
        return
    x = at_first(x, x_stride, x_token_stride, sequence, first)
    dt = at_first(dt, dt_stride, dt_token_stride, sequence, first) + head
    B = at_first(B, B_stride, B_token_stride, sequence, first) + head // (H // G) * N

    tile = tl.arange(0, BLOCK_P)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    if BLOCK:
        decays = first_of(scratch, sequence, head, tokens, H, BLOCK)
        scratch += size_of_decays(sequences, tokens, H, BLOCK)
    record = scratch + program * RECORD
    current = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if segment == 0:
        sources = (
            state_batch_indices, state_batch_indices_stride, state_batch_indices_token_stride, num_accepted_tokens,
            num_accepted_tokens_stride, source_columns,
        )  # fmt: skip
        source = source_of(sources, sequence, slots, PAD)
        wanted = source >= 0
        if has_initial_state is not None:
            wanted = wanted & (tl.load(has_initial_state + sequence * has_initial_state_stride) != 0)
        scale = state_scale if state_scale is None else state_scale + source * state_scale_stride
        current = state_in(
            state + source * state_stride, scale, wanted, (head, first_row, 0), channels, row_mask, P, N, BLOCK_P,
            BLOCK_N, STORED, WARPS, W, 0, False,
        )  # fmt: skip
        tl.store(record + tile, current)

    bias = dt_bias if dt_bias is None else tl.load(dt_bias + head).to(tl.float32)
    rate = tl.load(A + head).to(tl.float32) * LOG2_E
    t = tl.arange(0, Q)
    columns = tl.arange(0, BLOCK_N)
    total = 1.0
    for token in tl.range(begin, end, Q, num_stages=STAGES):
        # A segment that is not the last one has a multiple of UNIT tokens.
        there = tl.full((Q,), True, tl.int1) if UNIT % Q == 0 else token + t < end
        mask = there[:, None] & row_mask[None, :]
        Xs = tl.load(rows_from(x, token, x_token_stride, Q) + channels[None, :], mask=mask, other=0.0)
        columns_mask = there[:, None] & inside(columns, N, BLOCK_N)[None, :]
        Bs = tl.load(rows_from(B, token, B_token_stride, Q) + columns[None, :], mask=columns_mask, other=0.0)
        if BLOCK:
            # A chunk here is two there.
            half: tl.constexpr = Q // 2
            numbers = decays_at(decays, token)
            second = tl.load(numbers + 2 * size_of_chunk(half) - 1)
            after = tl.load(numbers + 3 * half + t // half * size_of_chunk(half) + t % half)
            after = tl.where(t < half, after * second, after)
            decay = tl.load(numbers + size_of_chunk(half) - 1) * second
        else:
            raw_d = tl.load(dt + (token + t.to(tl.int64)) * dt_token_stride, mask=there, other=0.0)
            coarse, fine, d = summed(*exponents_of(raw_d, there, rate, bias, SOFTPLUS))
            after, decay = decays_after(coarse, fine, d, t, Q)
        current = advanced(current, Xs, Bs, after, decay, False, B_PARTS)
        total *= decay
    tl.store(record + BLOCK_P * BLOCK_N + tile, current)
    tl.store(record + 2 * BLOCK_P * BLOCK_N, total)
