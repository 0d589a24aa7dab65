"""Long sequences in segments, which run side by side.

One launch, of ``segment_states``, computes the state after each segment but the last: the first from the state that
the sequence starts from, the others from zeros. In the next, of ``matrix_form``, the programs of a segment join those
of the segments before it,

    start[i + 1] = decay[i] start[i] + state[i]

and compute its outputs from there. How a sequence is split depends on its own length and on what is compiled in.

What is kept in between is a record for each segment but a sequence's last one, head and block of rows: two tiles and a
decay. The first tile is used for a sequence's first segment alone, and holds what the sequence starts from: by the time
that the outputs are computed, the state may have been overwritten.
"""

import triton
import triton.language as tl

# How many sequences are looked through at a time.
_LOOKED_THROUGH = tl.constexpr(1024)


@triton.jit
def bounds_of(segment, length, is_whole, SEGMENTS: tl.constexpr, LEAST: tl.constexpr, UNIT: tl.constexpr):
    """Return a segment's first token and the one after its last; both are the length where there is no such segment."""
    length = length.to(tl.int64)
    size = tl.maximum(LEAST, (length + SEGMENTS - 1) // SEGMENTS)
    size = tl.where(is_whole, length, (size + UNIT - 1) // UNIT * UNIT)
    begin = tl.where(segment < 0, length, tl.minimum(segment * size, length))
    return begin.to(tl.int32), tl.minimum(begin + size, length).to(tl.int32)


@triton.jit
def is_not_split(
    sequence, length, cu_seqlens, cu_seqlens_stride, sequences, tokens, SEGMENTS: tl.constexpr, LEAST: tl.constexpr
):
    """Return whether a sequence is one segment: a short one, or one whose records would be those of a later sequence.

    Packed sequences can share rows, and each has states of its own, but a block of rows has one record.
    """
    is_whole = length < 2 * LEAST
    if cu_seqlens is not None:  # noqa: SIM102
        if (length >= 2 * LEAST) & (_records_of_each(cu_seqlens, sequences, tokens, SEGMENTS, LEAST) == 0):
            at = cu_seqlens + sequence * cu_seqlens_stride
            first = _block(tl.load(at), tokens, LEAST)
            last = _block(tl.load(at + cu_seqlens_stride), tokens, LEAST)
            for i in range(sequence + 1, sequences, _LOOKED_THROUGH):
                begin, end = _blocks_of_others(i, cu_seqlens, cu_seqlens_stride, sequences, tokens, LEAST)
                shared = (begin < last) & (first < end) & (begin < end)
                is_whole |= tl.max(shared.to(tl.int32), 0) > 0
    return is_whole


@triton.jit
def segment_at(record, cu_seqlens, cu_seqlens_stride, sequences, tokens, SEGMENTS: tl.constexpr, LEAST: tl.constexpr):
    """Return the sequence of a record and which of its segments; of none less than -1."""
    each = _records_of_each(cu_seqlens, sequences, tokens, SEGMENTS, LEAST)
    sequence, segment = record // tl.maximum(each, 1), record % tl.maximum(each, 1)
    if cu_seqlens is not None and each == 0:
        sequence, segment = _searched(record, cu_seqlens, cu_seqlens_stride, sequences, tokens, LEAST)
    return sequence, segment


@triton.jit
def first_record(sequence, first, cu_seqlens, sequences, tokens, SEGMENTS: tl.constexpr, LEAST: tl.constexpr):
    """Return the record of a sequence's first segment."""
    each = _records_of_each(cu_seqlens, sequences, tokens, SEGMENTS, LEAST)
    return tl.where(each > 0, sequence * each, first // LEAST)


@triton.jit
def _records_of_each(cu_seqlens, sequences, tokens, SEGMENTS: tl.constexpr, LEAST: tl.constexpr):
    """Return how many records each sequence has; 0 if each has those of the blocks of rows that it ends.

    Segments but the last have at least LEAST tokens. Packed rows are cut into blocks of as many, and a sequence has no
    more records than blocks end inside of it or with it.
    """
    if cu_seqlens is None:
        return tl.minimum(SEGMENTS - 1, tokens // LEAST)
    else:
        return tl.where(sequences * (SEGMENTS - 1) <= tokens // LEAST, SEGMENTS - 1, 0)


@triton.jit
def _searched(record, cu_seqlens, cu_seqlens_stride, sequences, tokens, LEAST: tl.constexpr):
    """Return the sequence that has a block of rows, and how many it has before that one; of none less than -1."""
    found = tl.full((), -1, tl.int64)
    for i in range(0, sequences, _LOOKED_THROUGH):
        begin, end = _blocks_of_others(i, cu_seqlens, cu_seqlens_stride, sequences, tokens, LEAST)
        candidates = i + tl.arange(0, _LOOKED_THROUGH).to(tl.int64)
        has_it = (begin <= record) & (record < end)
        found = tl.maximum(found, tl.max(tl.where(has_it, candidates, -1), 0))
    sequence = tl.maximum(found, 0)
    block = _block(tl.load(cu_seqlens + sequence * cu_seqlens_stride), tokens, LEAST)
    return sequence, tl.where(found < 0, -2, record - block)


@triton.jit
def _blocks_of_others(i, cu_seqlens, cu_seqlens_stride, sequences, tokens, LEAST: tl.constexpr):
    """Return the first blocks of the sequences from i on, and those after their last ones."""
    others = i + tl.arange(0, _LOOKED_THROUGH).to(tl.int64)
    there = others < sequences
    at = cu_seqlens + others * cu_seqlens_stride
    begin = _block(tl.load(at, mask=there, other=0), tokens, LEAST)
    return begin, _block(tl.load(at + cu_seqlens_stride, mask=there, other=0), tokens, LEAST)


@triton.jit
def _block(row, tokens, LEAST: tl.constexpr):
    return tl.minimum(tl.maximum(row.to(tl.int64), 0), tokens) // LEAST


@triton.jit
def start_of_segment(
    scratch,
    record,
    segment,
    programs,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RECORD: tl.constexpr,
):
    """Return the state that a segment starts from. Records of a sequence are ``programs`` apart."""
    tile = tl.arange(0, BLOCK_P)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    SIZE: tl.constexpr = BLOCK_P * BLOCK_N
    record = scratch + record * RECORD
    current = tl.load(record + tl.where(segment == 0, 0, SIZE) + tile)
    for _ in range(1, segment):
        record += programs * RECORD
        current = tl.fma(current, tl.load(record + 2 * SIZE), tl.load(record + SIZE + tile))
    return current
