"""The forward pass of attention: a tile of queries walks over the keys it sees. See attention.py."""

import triton
import triton.language as tl

from fasttune.kernels.attention_rows import (
    LOG2E,
    RUN_TIME,
    extent,
    find_tile,
    head_of,
    keys_of_tile,
    load_rows,
    masked_walk,
    sees,
    store_rows,
    tile_positions,
)
from fasttune.kernels.attention_terms import rows_of, scores_of
from fasttune.kernels.philox import attention_drop_bits, dropped_weights


@triton.jit
def _forward_tiles(
    acc,
    total,
    m,
    q,
    k,
    v,
    bias,
    bias_reach,
    c2p,
    p2c,
    buckets,
    buckets_reach,
    seed,
    position,
    head,
    queries,
    start,
    keys,
    offset,
    first,
    last,
    gap_from,
    gap,
    window,
    k_row,
    v_row,
    c2p_row,
    p2c_row,
    scale,
    threshold,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    for first_key in range(first, last, STEP):
        if gap is not None:
            first_key += tl.where(first_key < gap_from, 0, gap)
        if seed is not None:
            within = 0 if STEP % 128 == 0 else first_key % 128
            bits = attention_drop_bits(seed, position, head, first_key - within, threshold)
        for part in tl.static_range(STEP // BLOCK_N):
            tile_key = first_key + part * BLOCK_N
            key = tile_key + tl.arange(0, BLOCK_N)
            k_tile = load_rows(k, start + tile_key, k_row, key < keys, MASKED, HEAD_DIM, BLOCK_D)
            c2p_rows, p2c_tile, p2c_rows = c2p_row, p2c, p2c_row
            if c2p is not None:
                c2p_rows = rows_of(c2p_row, queries, BLOCK_M)[:, None]
            if p2c is not None:
                p2c_tile += (start + tile_key).to(tl.int64) * p2c_row
                p2c_rows = rows_of(p2c_row, keys - tile_key, BLOCK_N)[None, :]
            s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
            ahead = key[None, :] - (position[:, None] + offset)
            s = scores_of(s, ahead, scale, bias, bias_reach, c2p, c2p_rows, p2c_tile, p2c_rows, buckets, buckets_reach)
            if MASKED:
                visible = (key < keys)[None, :]
                if CAUSAL or window is not None:
                    visible = visible & sees(position[:, None] + offset, key[None, :], window, CAUSAL)
                s = tl.where(visible, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            # A row that has seen no key yet has maximum -inf; subtracting 0 instead keeps its weights at 0, not NaN.
            shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
            p = tl.exp2(s - shift[:, None])
            rescale = tl.exp2(m - shift)
            total = total * rescale + tl.sum(p, 1)
            m = m_new
            if seed is not None:
                p = tl.where(dropped_weights(bits, within + part * BLOCK_N, BLOCK_N), 0.0, p)
            v_tile = load_rows(v, start + tile_key, v_row, key < keys, MASKED, HEAD_DIM, BLOCK_D)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision=PRECISION)
    return acc, total, m


@triton.jit(do_not_specialize=RUN_TIME)
def attention_forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    q_offsets,
    k_offsets,
    positions,
    seed,
    bias,
    c2p,
    p2c,
    buckets,
    first_head,
    heads,
    sequences,
    queries,
    keys,
    window,
    bias_reach,
    buckets_reach,
    q_sequence,
    q_row,
    q_head,
    k_sequence,
    k_row,
    k_head,
    v_sequence,
    v_row,
    v_head,
    c2p_sequence,
    c2p_row,
    c2p_head,
    p2c_sequence,
    p2c_row,
    p2c_head,
    out_sequence,
    out_row,
    out_head,
    lse_sequence,
    lse_head,
    scale,
    threshold,
    keep_scale,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    sequence, tile = find_tile(q_offsets, sequences, BLOCK_M)
    first_row, queries = extent(q_offsets, sequence, queries)
    start, keys = extent(k_offsets, sequence, keys)
    first_query = (tl.cdiv(queries, BLOCK_M) - 1 - tile) * BLOCK_M
    if first_query < 0:
        return
    valid = first_query + tl.arange(0, BLOCK_M) < queries
    position, lowest, highest, offset = tile_positions(positions, first_row, first_query, queries, keys, BLOCK_M)
    head = first_head + sequence * heads + tl.program_id(1)  # its number for the dropout
    if seed is not None:
        seed = tl.load(seed)
    first_row += first_query
    q_tile = load_rows(head_of(q, q_sequence, q_head), first_row, q_row, valid, True, HEAD_DIM, BLOCK_D)
    k, v = head_of(k, k_sequence, k_head), head_of(v, v_sequence, v_head)
    first, inner, full, last = keys_of_tile(lowest + offset, highest + offset, keys, window, CAUSAL, STEP)
    if bias is not None:
        bias += tl.program_id(1) * (2 * bias_reach + 1)
    if c2p is not None:
        c2p = head_of(c2p, c2p_sequence, c2p_head) + first_row.to(tl.int64) * c2p_row
    if p2c is not None:
        p2c = head_of(p2c, p2c_sequence, p2c_head)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    PLAIN: tl.constexpr = bias is None and buckets is None
    if not PLAIN:  # half of the code: all tiles are masked
        inner, full = first, first
    begin, end, gap = inner, full, None
    for MASKED in tl.static_range(2):
        if MASKED:
            begin, end = masked_walk(first, inner, full, last, window)
            if window is not None:
                gap = full - inner
        if MASKED or PLAIN:
            acc, total, m = _forward_tiles(
                *(acc, total, m, q_tile, k, v, bias, bias_reach, c2p, p2c, buckets, buckets_reach, seed, position),
                *(head, queries - first_query, start, keys, offset, begin, end, inner, gap, window, k_row, v_row),
                *(c2p_row, p2c_row, scale * LOG2E, threshold),
                *(MASKED, CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, STEP, PRECISION),
            )
    seen = total > 0.0
    acc *= tl.where(seen, keep_scale / tl.where(seen, total, 1.0), 0.0)[:, None]
    log = tl.where(seen, m + tl.log2(tl.where(seen, total, 1.0)), float("inf"))
    tl.store(head_of(lse, lse_sequence, lse_head) + first_row + tl.arange(0, BLOCK_M), log, mask=valid)
    store_rows(head_of(out, out_sequence, out_head), first_row, out_row, acc, valid, HEAD_DIM, BLOCK_D)
