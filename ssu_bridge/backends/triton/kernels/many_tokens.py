"""Tokens of a sequence one after the other: a program keeps a block of rows (headdim) of one head's state in registers.

It does whatever ``update`` describes: T tokens or packed ones, tables with a column for each token, intermediate
states, quantised ones, stochastic rounding. Each token is computed as the single-token kernel does it, with the same
bits. Every index is checked before anything is loaded or stored by it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ssu_bridge.backends.triton.kernels.common import (
    by_row,
    checked,
    decay_of,
    gated_output,
    inside,
    load,
    prefetch,
    slot_of,
    time_step,
    to_float32,
)
from ssu_bridge.backends.triton.kernels.rounding import as_stored, rounded, row_scale, widen
from ssu_bridge.core import arguments

MOST_TOKENS_OF_A_TREE = tl.constexpr(arguments.MOST_TOKENS_OF_A_TREE)


@triton.jit
def many_tokens(
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
    parent_tokens,
    has_initial_state,
    state_scale,
    intermediate_state_scales,
    rand_seed,
    out,
    slots,
    tokens,
    source_columns,
    target_columns,
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
    parent_tokens_stride,
    has_initial_state_stride,
    state_scale_stride,
    intermediate_state_scales_stride,
    out_stride,
    x_token_stride,
    dt_token_stride,
    B_token_stride,
    C_token_stride,
    z_token_stride,
    state_batch_indices_token_stride,
    dst_state_batch_indices_token_stride,
    parent_tokens_token_stride,
    out_token_stride,
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
    STORED: tl.constexpr,
    STORE_STATE: tl.constexpr,
    INTERMEDIATE_STRIDE: tl.constexpr,
    ROUNDS: tl.constexpr,
    ROUND_EACH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Advance ``state`` in place, and write ``out`` and the intermediate states. An absent array is None.

    A ``stride`` leads from one sequence, slot or entry to the next, a ``token_stride`` from one token to the next;
    packed arrays have only this one, and arrays of single tokens only that one. ``tokens`` is the number of tokens of a
    sequence, or of all packed ones together; None for single ones. STORED is the dtype of the state, STORE_STATE
    whether any state is stored in it, ROUNDS those of the random generator, ROUND_EACH whether the state is
    rounded to what it is stored in after each token. The grid and OVERLAP are those of the single-token kernel.
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
    row_mask, column_mask = inside(rows, P, BLOCK_P), inside(columns, N, BLOCK_N)
    tile_mask = row_mask[:, None] & column_mask[None, :]
    tile = head.to(tl.int64) * (P * N) + (rows[:, None] * N + columns[None, :])
    channels = head * P + rows
    place = (channels, row_mask, tile, tile_mask)

    first, length = tokens_of(cu_seqlens, cu_seqlens_stride, sequence, tokens)
    if parent_tokens is not None:
        length = tl.minimum(length, MOST_TOKENS_OF_A_TREE)
    if length <= 0:
        return
    x = at_first(x, x_stride, x_token_stride, sequence, first)
    dt = at_first(dt, dt_stride, dt_token_stride, sequence, first)
    B = at_first(B, B_stride, B_token_stride, sequence, first)
    C = at_first(C, C_stride, C_token_stride, sequence, first)
    z = z if z is None else at_first(z, z_stride, z_token_stride, sequence, first)
    out = at_first(out, out_stride, out_token_stride, sequence, first)
    seed = rand_seed if rand_seed is None else tl.load(rand_seed)

    sources = state_batch_indices
    if num_accepted_tokens is not None:
        accepted = tl.load(num_accepted_tokens + sequence * num_accepted_tokens_stride).to(tl.int64)
        column = tl.minimum(tl.maximum(accepted, 1), source_columns) - 1
        sources += column * state_batch_indices_token_stride
    source = slot_of(sources, state_batch_indices_stride, sequence, slots, PAD)
    live = source >= 0
    if AHEAD:
        prefetch(
            program + AHEAD, tl.num_programs(0), state, state_batch_indices, state_stride, state_batch_indices_stride,
            slots, H * blocks, BLOCK_P * N, PAD,
        )  # fmt: skip
    loads = live
    if has_initial_state is not None:
        loads = live & (tl.load(has_initial_state + sequence * has_initial_state_stride) != 0)
    current = widen(tl.load(state + source * state_stride + tile, mask=tile_mask & loads, other=0), STORED)
    if state_scale is not None:
        current *= load(state_scale + source * state_scale_stride + channels, row_mask & loads)[:, None]

    entry = source
    if intermediate_state_indices is not None:
        entry = tl.load(intermediate_state_indices + sequence * intermediate_state_indices_stride).to(tl.int64)
    if intermediate_states is not None:
        entry = checked(entry, entries, -1)

    bias = dt_bias if dt_bias is None else by_row(dt_bias, head, rows, row_mask, P, TIED_DT_BIAS)
    skip = D if D is None else by_row(D, head, rows, row_mask, P, TIED_D)
    if TIED_A:
        As = tl.load(A + head).to(tl.float32)
    group = head // (H // G) * N + columns
    x, B, C = x + channels, B + group, C + group
    dt = dt + (head if TIED_DT else channels)
    dt_mask = None if TIED_DT else row_mask
    # Of ROUND_EACH: where a token's state goes decides by which random words it is rounded.
    route = (
        dst_state_batch_indices, dst_state_batch_indices_stride, dst_state_batch_indices_token_stride, target_columns,
        sequence, source, length, slots,
    )  # fmt: skip
    # After the last token. What is rounded after each one and has no scale is no other number when it is rounded again.
    STORED_LAST: tl.constexpr = dst_state_batch_indices_token_stride is None and (not ROUND_EACH or state_scale is None)
    if parent_tokens is not None:
        start = current
        parents = at_first(parent_tokens, parent_tokens_stride, parent_tokens_token_stride, sequence, first)
    next_x, next_dt = tl.load(x, mask=row_mask), tl.load(dt, mask=dt_mask)
    next_B, next_C = tl.load(B, mask=column_mask, other=0), tl.load(C, mask=column_mask, other=0)
    for token in range(length):
        xs, d = next_x.to(tl.float32), next_dt.to(tl.float32)
        Bs, Cs = to_float32(next_B), to_float32(next_C)
        # The next token's inputs are loaded before this token is computed, so that the next one does not wait.
        following = tl.minimum(token + 1, length - 1).to(tl.int64)
        next_x = tl.load(x + following * x_token_stride, mask=row_mask)
        next_dt = tl.load(dt + following * dt_token_stride, mask=dt_mask)
        next_B = tl.load(B + following * B_token_stride, mask=column_mask, other=0)
        next_C = tl.load(C + following * C_token_stride, mask=column_mask, other=0)

        if parent_tokens is not None:
            # The states of earlier tokens are not kept: those that this one descends from are computed again, with the
            # same bits, unless it continues the token before.
            parent = _parent_of(parents, parent_tokens_token_stride, token)
            if parent != token - 1:
                current = start
                ancestors = _ancestors(parents, parent_tokens_token_stride, parent)
                for earlier in range(parent + 1):
                    if ((ancestors >> earlier) & 1) != 0:
                        then = tl.cast(earlier, tl.int64)
                        old_x = tl.load(x + then * x_token_stride, mask=row_mask).to(tl.float32)
                        old_d = tl.load(dt + then * dt_token_stride, mask=dt_mask).to(tl.float32)
                        old_B = tl.load(B + then * B_token_stride, mask=column_mask, other=0).to(tl.float32)
                        old_A = As if TIED_A else load(A + tile, tile_mask)
                        current = _advanced(current, old_A, time_step(old_d, bias, SOFTPLUS), old_x, old_B)
                        if ROUND_EACH:
                            goes_to = _slot_after(earlier, route, PAD, STORE_STATE)
                            scales = state_scale if state_scale is None else row_scale(current, STORED)
                            numbers = as_stored(
                                current, scales, channels, rand_seed if rand_seed is None else tl.load(rand_seed),
                                _named(goes_to, source) * (H * P * N), earlier, 0, N, BLOCK_N, STORED, ROUNDS,
                            )  # fmt: skip
                            current = _worth(numbers, scales, STORED)
        d = time_step(d, bias, SOFTPLUS)
        if not TIED_A:
            As = load(A + tile, tile_mask)
        current = _advanced(current, As, d, xs, Bs)

        # The seed is loaded anew for each token. If it were not, what every token's random numbers begin with would be
        # computed once, before the loop, and take more registers than there are.
        if ROUND_EACH:
            # Once, and what it is rounded to goes wherever it is stored.
            goes_to = _slot_after(token, route, PAD, STORE_STATE)
            scales = state_scale if state_scale is None else row_scale(current, STORED)
            numbers = as_stored(
                current, scales, channels, rand_seed if rand_seed is None else tl.load(rand_seed),
                _named(goes_to, source) * (H * P * N), token, 0, N, BLOCK_N, STORED, ROUNDS,
            )  # fmt: skip
            if STORE_STATE and not STORED_LAST:
                scale = state_scale if state_scale is None else state_scale + goes_to * state_scale_stride
                _put(numbers, scales, state + goes_to * state_stride, scale, goes_to >= 0, place)
        elif dst_state_batch_indices_token_stride is not None:
            targets = dst_state_batch_indices + token * dst_state_batch_indices_token_stride
            target = slot_of(targets, dst_state_batch_indices_stride, sequence, slots, PAD, token < target_columns)
            scale = state_scale if state_scale is None else state_scale + target * state_scale_stride
            _store(
                current, state + target * state_stride, scale, live & (target >= 0), place,
                rand_seed if rand_seed is None else tl.load(rand_seed),
                target * (H * P * N), token, 0, N, STORED, ROUNDS,
            )  # fmt: skip
        if intermediate_states is not None:
            step = tl.cast(token // INTERMEDIATE_STRIDE, tl.int64)
            stored = (token + 1) % INTERMEDIATE_STRIDE == 0
            target_states = intermediate_states + entry * intermediate_states_stride + step * (H * P * N)
            scale = intermediate_state_scales
            if scale is not None:
                scale = scale + entry * intermediate_state_scales_stride + step * (H * P)
            wanted = live & (entry >= 0) & stored & (step < steps)
            if ROUND_EACH:
                _put(numbers, scales, target_states, scale, wanted, place)
            else:
                _store(
                    current, target_states, scale, wanted, place,
                    rand_seed if rand_seed is None else tl.load(rand_seed),
                    entry * (H * P * N), token, 1, N, STORED, ROUNDS,
                )  # fmt: skip

        y = tl.sum(current * Cs[None, :], axis=1)
        at = tl.cast(token, tl.int64)
        gate = z if z is None else load(z + at * z_token_stride + channels, row_mask)
        y = gated_output(y, xs, skip, gate)
        tl.store(out + at * out_token_stride + channels, y.to(out.dtype.element_ty), mask=row_mask)
        if ROUND_EACH:
            current = _worth(numbers, scales, STORED)

    if STORE_STATE and STORED_LAST:
        target = source
        if dst_state_batch_indices is not None:
            target = slot_of(dst_state_batch_indices, dst_state_batch_indices_stride, sequence, slots, PAD)
        scale = state_scale if state_scale is None else state_scale + target * state_scale_stride
        _store(
            current, state + target * state_stride, scale, live & (target >= 0), place,
            None if ROUND_EACH else seed, target * (H * P * N), length - 1, 0, N, STORED, ROUNDS,
        )  # fmt: skip


@triton.jit
def _advanced(state, A, d, x, B):
    """Return a tile of a state after a token."""
    return tl.fma(state, decay_of(A, d, state.shape[0], state.shape[1]), (d * x)[:, None] * B[None, :])


@triton.jit
def _parent_of(parents, token_stride, token):
    """Return the token whose state a token of a tree continues, -1 for the state that the sequence starts from."""
    parent = tl.load(parents + token * token_stride).to(tl.int64)
    return tl.where((parent < 0) | (parent >= token), -1, parent).to(tl.int32)


@triton.jit
def _ancestors(parents, token_stride, token):
    """Return a bit for a token and each that it descends from; of -1 none."""
    bits = tl.full((), 0, tl.int64)
    while token >= 0:
        bits |= tl.full((), 1, tl.int64) << token
        token = _parent_of(parents, token_stride, token)
    return bits


@triton.jit
def tokens_of(cu_seqlens, stride, sequence, tokens):
    """Return a sequence's first row in packed arrays and its number of tokens, whatever cu_seqlens holds."""
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + sequence * stride).to(tl.int64)
        end = tl.load(cu_seqlens + (sequence + 1) * stride).to(tl.int64)
        first = tl.minimum(tl.maximum(first, 0), tokens)
        end = tl.minimum(tl.maximum(end, 0), tokens)
        return first, (end - first).to(tl.int32)
    elif tokens is None:
        return 0, 1
    else:
        return 0, tokens.to(tl.int32)


@triton.jit
def at_first(pointer, stride, token_stride, sequence, first):
    """Return where a sequence's first token is."""
    if stride is None:
        return pointer + first * token_stride
    else:
        return pointer + sequence * stride


@triton.jit
def rows_from(pointer, token, token_stride, ROWS: tl.constexpr):
    """Return where the rows of so many tokens begin, from a token on, [rows, 1]."""
    rows = tl.arange(0, ROWS).to(tl.int64) * token_stride
    return pointer + tl.cast(token, tl.int64) * token_stride + rows[:, None]


@triton.jit
def _slot_after(token, route, PAD: tl.constexpr, STORE_STATE: tl.constexpr):
    """Return the slot that the state after a token goes to, -1 for none."""
    table, stride, token_stride, columns, sequence, source, length, slots = route
    if not STORE_STATE:
        return tl.full((), -1, tl.int64)
    if token_stride is not None:
        slot = slot_of(table + token * token_stride, stride, sequence, slots, PAD, token < columns)
    elif table is not None:
        slot = tl.where(token == length - 1, slot_of(table, stride, sequence, slots, PAD), -1)
    else:
        slot = tl.where(token == length - 1, source, -1)
    return tl.where(source >= 0, slot, -1)


@triton.jit
def _named(slot, source):
    """Return the slot whose random words a state is rounded by: where it goes to, else what was read, 0 for a pad."""
    return tl.where(slot >= 0, slot, tl.maximum(source, 0))


@triton.jit
def _worth(numbers, scales, STORED: tl.constexpr):
    """Return the state that stored numbers stand for."""
    state = widen(numbers, STORED)
    if scales is not None:
        state *= scales[:, None]
    return state


@triton.jit
def _put(numbers, scales, values, scale, wanted, place):
    """Store what a tile of a state was rounded to, if that is ``wanted``, where ``_store`` does."""
    channels, row_mask, tile, tile_mask = place
    tl.store(values + tile, numbers, mask=tile_mask & wanted)
    if scale is not None:
        tl.store(scale + channels, scales, mask=row_mask & wanted)


@triton.jit
def _store(
    current,
    values,
    scale,
    wanted,
    place,
    seed,
    first,
    token,
    last,
    N: tl.constexpr,
    STORED: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Round a tile of a state to what is stored, and store it if that is ``wanted``.

    It goes to a slot, or an entry and step, that begins at ``values`` and, of a quantised state, ``scale``. ``first``
    is the number of the slot's first element, ``token`` and ``last`` are words of the random generator's counter.
    """
    channels, row_mask, tile, tile_mask = place
    stored = rounded(
        current, scale, wanted, channels, row_mask, seed, first, token, last, N, tile.shape[1], STORED, ROUNDS
    )
    tl.store(values + tile, stored, mask=tile_mask & wanted)
