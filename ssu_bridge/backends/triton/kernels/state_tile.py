"""The block of one head's state that a program of the matrix form keeps, as its threads hold it for products."""

import triton
import triton.language as tl

from ssu_bridge.backends.triton.kernels.common import load, slot_of
from ssu_bridge.backends.triton.kernels.products import groups_of, in_rows, in_turns, mixed, tile_of, unmixed
from ssu_bridge.backends.triton.kernels.rounding import as_stored, row_scale, widen


@triton.jit
def source_of(sources, sequence, slots, PAD: tl.constexpr):
    """Return the slot that a sequence's state is read from, -1 for a pad."""
    table, stride, token_stride, num_accepted_tokens, num_accepted_tokens_stride, source_columns = sources
    if num_accepted_tokens is not None:
        accepted = tl.load(num_accepted_tokens + sequence * num_accepted_tokens_stride).to(tl.int64)
        table += (tl.minimum(tl.maximum(accepted, 1), source_columns) - 1) * token_stride
    return slot_of(table, stride, sequence, slots, PAD)


@triton.jit
def state_in(
    values,
    scale,
    wanted,
    place,
    channels,
    row_mask,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STORED: tl.constexpr,
    WARPS: tl.constexpr,
    W: tl.constexpr,
    MIX: tl.constexpr,
    AS_IT_IS: tl.constexpr,
):
    """Return a tile of a stored state, zeros unless it is ``wanted``: float32, or as it is stored."""
    tile, mask = tile_of(place, P, N, BLOCK_P, BLOCK_N, WARPS, W)
    current = in_rows(tl.load(values + tile, mask=mask & wanted, other=0), BLOCK_P, BLOCK_N, WARPS, W)
    current = mixed(current, MIX)
    if not AS_IT_IS:
        current = widen(current, STORED)
    if scale is not None:
        current *= load(scale + channels, row_mask & wanted)[:, None]
    return current


@triton.jit
def store_state(
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
    MIX: tl.constexpr,
):
    """Round a state to what is stored and store it, as ``many_tokens`` does with the same arguments."""
    current = unmixed(current, MIX)
    scales = scale if scale is None else row_scale(current, STORED)
    if scale is not None:
        tl.store(scale + channels, scales, mask=row_mask & wanted)
    # Random numbers take registers: those of a group of columns at a time.
    COLUMNS: tl.constexpr = BLOCK_N if seed is None else W
    parts = groups_of(current.reshape(BLOCK_P, BLOCK_N // COLUMNS, COLUMNS))
    head, first_row, _ = place
    for i in tl.static_range(len(parts)):
        column = i * COLUMNS
        stored = as_stored(parts[i], scales, channels, seed, first + column, token, last, N, COLUMNS, STORED, ROUNDS)
        tile, mask = tile_of((head, first_row, column), P, N, BLOCK_P, COLUMNS, WARPS, W)
        tl.store(values + tile, in_turns(stored, BLOCK_P, COLUMNS, WARPS, W), mask=mask & wanted)
