"""What the attention kernels share: where a sequence's queries and keys lie, and rows of a head.

Queries and keys are walked by the number they have in their sequence, from 0. Dense, a head's pointer begins at its
sequence; packed, q_offsets and k_offsets (N + 1,) hold the first row of each, and are one tensor unless only chosen
queries are there. `positions` (R,) then holds the position of each in its sequence, never falling; else query i stands
at i, for causality at i + keys - queries.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# Sizes and strides that change with the batch: no new compilation for them.
RUN_TIME = ["first_head", "heads", "sequences", "queries", "keys", "window", "bias_reach", "buckets_reach"]
RUN_TIME += ["threshold", "lse_sequence", "lse_head"]


@triton.jit
def find_tile(offsets, sequences, BLOCK: tl.constexpr):
    """This program's sequence and tile of BLOCK rows.

    Packed, sequence s owns the programs from offsets[s] // BLOCK + s on: at least as many as it has tiles, and the
    grid needs no length but the total. The largest such s is found by bisection; programs without a tile leave.
    """
    if offsets is None:
        sequence, tile = tl.program_id(2), tl.program_id(0)
    else:
        program = tl.program_id(0)
        sequence, above = program * 0, program * 0 + sequences
        while sequence + 1 < above:
            middle = (sequence + above) // 2
            before = tl.load(offsets + middle).to(tl.int32) // BLOCK + middle <= program
            sequence, above = tl.where(before, middle, sequence), tl.where(before, above, middle)
        tile = program - tl.load(offsets + sequence).to(tl.int32) // BLOCK - sequence
    return sequence, tile


@triton.jit
def extent(offsets, sequence, rows):
    """A sequence's first row and how many it has."""
    first = 0
    if offsets is not None:
        first = tl.load(offsets + sequence).to(tl.int32)
        rows = tl.load(offsets + sequence + 1).to(tl.int32) - first
    return first, rows


@triton.jit
def tile_positions(positions, first_row, first_query, queries, keys, BLOCK_M: tl.constexpr):
    """Of a tile of queries: the position of each, the first one's and the last one's, and what causality adds."""
    position = first_query + tl.arange(0, BLOCK_M)
    lowest, highest, offset = first_query, tl.minimum(first_query + BLOCK_M, queries) - 1, keys - queries
    if positions is not None:
        positions += first_row
        position = tl.load(positions + position, mask=position < queries, other=0)
        lowest, highest, offset = tl.load(positions + lowest), tl.load(positions + highest), 0
    return position, lowest, highest, offset


@triton.jit
def keys_of_tile(lowest, highest, keys, window, CAUSAL: tl.constexpr, STEP: tl.constexpr):
    """(first, inner, full, last) for a tile of queries that stand from `lowest` to `highest` among the keys: all see
    the keys from `inner` to `full`; some may see those from `first` to `inner` and from `full` to `last`. All but
    the last are multiples of STEP."""
    first, inner, full, last = 0, 0, keys, keys
    if CAUSAL:
        full, last = tl.minimum(keys - 1, lowest) + 1, tl.minimum(keys - 1, highest) + 1
    elif window is not None:  # subtracted before it is added: the sum may have more than 32 bits
        full = tl.minimum(keys - 1 - window, lowest) + window + 1
        last = tl.minimum(keys - 1 - window, highest) + window + 1
    full = tl.maximum(full, 0) // STEP * STEP
    if window is not None:
        first = tl.minimum(tl.maximum(lowest - window, 0) // STEP * STEP, full)
        inner = tl.cdiv(tl.minimum(tl.maximum(highest - window, 0), full), STEP) * STEP
    return first, inner, full, last


@triton.jit
def masked_walk(first, inner, full, last, window):
    """(begin, end) of one loop over the masked tiles: they lie behind `full` or, with a window, on both sides of what
    is between `inner` and `full`, which is the gap from `inner` on."""
    begin, end = full, last
    if window is not None:
        begin, end = first, last - (full - inner)
    return begin, end


@triton.jit
def sees(position, key, window, CAUSAL: tl.constexpr):
    """Whether queries see keys, where causality or a window bounds them."""
    if window is None:
        visible = key <= position
    elif CAUSAL:
        visible = (key <= position) & (key >= position - window)
    else:
        visible = tl.abs(key - position) <= window
    return visible


@triton.jit
def first_query_from(positions, first_row, queries, offset, position):
    """The first query that stands at `position` or beyond among the keys; it need not exist."""
    if positions is None:
        query = tl.maximum(position - offset, 0)
    else:
        query, above = position * 0, position * 0 + queries
        while query < above:
            middle = (query + above) // 2
            before = tl.load(positions + first_row + middle) < position
            query, above = tl.where(before, middle + 1, query), tl.where(before, above, middle)
    return query


@triton.jit
def head_of(x, sequence_stride, head_stride):
    return x + tl.program_id(2).to(tl.int64) * sequence_stride + tl.program_id(1).to(tl.int64) * head_stride


@triton.jit
def load_rows(x, first, row_stride, valid, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows of a head from `first` on, [len(valid), BLOCK_D]: those that are valid, zeros beyond HEAD_DIM; without
    MASKED all are known to be valid."""
    pointers = _pointers(x, first, row_stride, valid, BLOCK_D)
    if MASKED:
        if HEAD_DIM == BLOCK_D:
            return tl.load(pointers, mask=valid[:, None], other=0.0)
        return tl.load(pointers, mask=valid[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(x, first, row_stride, value, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers = _pointers(x, first, row_stride, valid, BLOCK_D)
    mask = valid[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _pointers(x, first, row_stride, valid, BLOCK_D: tl.constexpr):
    ROWS: tl.constexpr = valid.shape[0]
    return x + (first + tl.arange(0, ROWS)).to(tl.int64)[:, None] * row_stride + tl.arange(0, BLOCK_D)[None, :]
