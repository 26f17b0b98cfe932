"""The backward pass of attention: a kernel for δ and dQ by tiles of queries, one for dK and dV by tiles of keys. See
attention.py."""

import triton
import triton.language as tl

from fasttune.kernels.attention_rows import (
    LOG2E,
    RUN_TIME,
    extent,
    find_tile,
    first_query_from,
    head_of,
    keys_of_tile,
    load_rows,
    masked_walk,
    sees,
    store_rows,
    tile_positions,
)
from fasttune.kernels.attention_terms import add_buckets, add_diagonals, rows_of, scores_of
from fasttune.kernels.philox import attention_drop_bits, dropped_weights, dropped_weights_transposed


@triton.jit
def _dq_tiles(
    dq,
    q,
    do,
    lse,
    delta,
    k,
    v,
    bias,
    bias_reach,
    c2p,
    p2c,
    buckets,
    buckets_reach,
    ranks,
    dbias,
    dc2p,
    seed,
    position,
    lowest,
    highest,
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
    dc2p_row,
    scale,
    threshold,
    keep_scale,
    DQ: tl.constexpr,
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
            v_tile = load_rows(v, start + tile_key, v_row, key < keys, MASKED, HEAD_DIM, BLOCK_D)
            c2p_rows, p2c_tile, p2c_rows = c2p_row, p2c, p2c_row
            if c2p is not None:
                c2p_rows = rows_of(c2p_row, queries, BLOCK_M)[:, None]
            if p2c is not None:
                p2c_tile += (start + tile_key).to(tl.int64) * p2c_row
                p2c_rows = rows_of(p2c_row, keys - tile_key, BLOCK_N)[None, :]
            s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
            ahead = key[None, :] - (position[:, None] + offset)
            s = scores_of(s, ahead, scale, bias, bias_reach, c2p, c2p_rows, p2c_tile, p2c_rows, buckets, buckets_reach)
            p = tl.exp2(s - lse[:, None])
            if MASKED:
                visible = (key < keys)[None, :]
                if CAUSAL or window is not None:
                    visible = visible & sees(position[:, None] + offset, key[None, :], window, CAUSAL)
                p = tl.where(visible, p, 0.0)
            dp = tl.dot(do, tl.trans(v_tile), input_precision=PRECISION)
            if seed is not None:
                dp = tl.where(dropped_weights(bits, within + part * BLOCK_N, BLOCK_N), 0.0, dp * keep_scale)
            ds = p * (dp - delta[:, None])
            least, most = tile_key - (highest + offset), tile_key + BLOCK_N - 1 - (lowest + offset)
            if dbias is not None:
                add_diagonals(dbias, ds, ahead, least, most, bias_reach)
            if dc2p is not None:
                rows, valid = rows_of(dc2p_row, queries, BLOCK_M), tl.arange(0, BLOCK_M) < queries
                add_buckets(dc2p, rows, ds, ahead, least, most, valid, key < keys, None, buckets, ranks, buckets_reach)
            if DQ:
                dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=RUN_TIME)
def attention_dq_kernel(
    do,
    q,
    k,
    v,
    out,
    lse,
    delta,
    dq,
    dbias,
    dc2p,
    q_offsets,
    k_offsets,
    positions,
    seed,
    bias,
    c2p,
    p2c,
    buckets,
    ranks,
    first_head,
    heads,
    sequences,
    queries,
    keys,
    window,
    bias_reach,
    buckets_reach,
    do_sequence,
    do_row,
    do_head,
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
    dq_sequence,
    dq_row,
    dq_head,
    dc2p_sequence,
    dc2p_row,
    dc2p_head,
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
    """Writes δ, which the dK, dV kernel reads, and what is not None of dQ, a row of dbias, this program's, and
    dc2p, in float32 and but for the scale."""
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
    do_tile = load_rows(head_of(do, do_sequence, do_head), first_row, do_row, valid, True, HEAD_DIM, BLOCK_D)
    out_tile = load_rows(head_of(out, out_sequence, out_head), first_row, out_row, valid, True, HEAD_DIM, BLOCK_D)
    delta_tile = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    statistic = head_of(first_row + tl.arange(0, BLOCK_M), lse_sequence, lse_head)
    tl.store(delta + statistic, delta_tile, mask=valid)
    DQ: tl.constexpr = dq is not None
    if DQ or dbias is not None or dc2p is not None:
        lse_tile = tl.load(lse + statistic, mask=valid, other=float("inf"))
        q_tile = load_rows(head_of(q, q_sequence, q_head), first_row, q_row, valid, True, HEAD_DIM, BLOCK_D)
        k, v = head_of(k, k_sequence, k_head), head_of(v, v_sequence, v_head)
        if bias is not None:
            bias += tl.program_id(1) * (2 * bias_reach + 1)
        if dbias is not None:
            program = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
            dbias += (program * tl.num_programs(1) + tl.program_id(1)) * (2 * bias_reach + 1)
        if c2p is not None:
            c2p = head_of(c2p, c2p_sequence, c2p_head) + first_row.to(tl.int64) * c2p_row
        if dc2p is not None:
            dc2p = head_of(dc2p, dc2p_sequence, dc2p_head) + first_row.to(tl.int64) * dc2p_row
        if p2c is not None:
            p2c = head_of(p2c, p2c_sequence, p2c_head)
        first, inner, full, last = keys_of_tile(lowest + offset, highest + offset, keys, window, CAUSAL, STEP)
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
                acc = _dq_tiles(
                    *(acc, q_tile, do_tile, lse_tile, delta_tile, k, v, bias, bias_reach, c2p, p2c, buckets),
                    *(buckets_reach, ranks, dbias, dc2p, seed, position, lowest, highest, head, queries - first_query),
                    *(start, keys, offset, begin, end, inner, gap, window, k_row, v_row, c2p_row, p2c_row, dc2p_row),
                    *(scale * LOG2E, threshold, keep_scale),
                    *(DQ, MASKED, CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, STEP, PRECISION),
                )
        if DQ:
            store_rows(head_of(dq, dq_sequence, dq_head), first_row, dq_row, acc * scale, valid, HEAD_DIM, BLOCK_D)


@triton.jit
def _dkdv_tiles(
    dk,
    dv,
    k,
    v,
    q,
    do,
    lse,
    delta,
    bias,
    bias_reach,
    c2p,
    p2c,
    buckets,
    buckets_reach,
    ranks,
    dp2c,
    seed,
    key,
    first_key,
    keys,
    head,
    positions,
    first_row,
    queries,
    offset,
    first,
    last,
    gap_from,
    gap,
    window,
    q_row,
    do_row,
    c2p_row,
    p2c_row,
    dp2c_row,
    scale,
    threshold,
    keep_scale,
    DK: tl.constexpr,
    DV: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    for first_query in range(first, last, BLOCK_M):
        if gap is not None:
            first_query += tl.where(first_query < gap_from, 0, gap)
        query = first_query + tl.arange(0, BLOCK_M)
        valid = query < queries
        row = first_row + first_query
        q_tile = load_rows(q, row, q_row, valid, True, HEAD_DIM, BLOCK_D)
        do_tile = load_rows(do, row, do_row, valid, True, HEAD_DIM, BLOCK_D)
        lse_tile = tl.load(lse + first_row + query, mask=valid, other=float("inf"))
        delta_tile = tl.load(delta + first_row + query, mask=valid, other=0.0)
        position = query
        if positions is not None:
            position = tl.load(positions + first_row + query, mask=valid, other=0)
        c2p_tile, c2p_rows, p2c_rows = c2p, c2p_row, p2c_row
        if c2p is not None:
            c2p_tile += row.to(tl.int64) * c2p_row
            c2p_rows = rows_of(c2p_row, queries - first_query, BLOCK_M)[None, :]
        if p2c is not None:
            p2c_rows = rows_of(p2c_row, keys - first_key, BLOCK_N)[:, None]
        s = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION)  # transposed: [keys, queries]
        ahead = key[:, None] - (position[None, :] + offset)
        s = scores_of(s, ahead, scale, bias, bias_reach, c2p_tile, c2p_rows, p2c, p2c_rows, buckets, buckets_reach)
        p = tl.exp2(s - lse_tile[None, :])
        if MASKED:
            p = tl.where(sees(position[None, :] + offset, key[:, None], window, CAUSAL), p, 0.0)
        dp = tl.dot(v, tl.trans(do_tile), input_precision=PRECISION)
        kept = p
        if seed is not None:
            dropped = dropped_weights_transposed(
                seed, position, head, first_key // 128 * 128, threshold, first_key % 128, BLOCK_N
            )
            kept = tl.where(dropped, 0.0, p * keep_scale)
            dp = tl.where(dropped, 0.0, dp * keep_scale)
        if DV:
            dv = tl.dot(kept.to(do_tile.dtype), do_tile, dv, input_precision=PRECISION)
        ds = p * (dp - delta_tile[None, :])
        if dp2c is not None:
            lowest, highest, before = first_query, tl.minimum(first_query + BLOCK_M, queries) - 1, None
            if positions is not None:
                lowest, highest = tl.load(positions + first_row + lowest), tl.load(positions + first_row + highest)
                same = (position[:, None] == position[None, :]) & (query[:, None] < query[None, :])
                before = tl.sum(same.to(tl.int32), 0)
            least, most = first_key - (highest + offset), first_key + BLOCK_N - 1 - (lowest + offset)
            rows = rows_of(dp2c_row, keys - first_key, BLOCK_N)
            add_buckets(dp2c, rows, ds, ahead, least, most, key < keys, valid, before, buckets, ranks, buckets_reach)
        if DK:
            dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=RUN_TIME)
def attention_dkdv_kernel(
    do,
    q,
    k,
    v,
    lse,
    delta,
    dk,
    dv,
    dp2c,
    q_offsets,
    k_offsets,
    positions,
    seed,
    bias,
    c2p,
    p2c,
    buckets,
    ranks,
    first_head,
    heads,
    sequences,
    queries,
    keys,
    window,
    bias_reach,
    buckets_reach,
    do_sequence,
    do_row,
    do_head,
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
    dk_sequence,
    dk_row,
    dk_head,
    dv_sequence,
    dv_row,
    dv_head,
    dp2c_sequence,
    dp2c_row,
    dp2c_head,
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
    PRECISION: tl.constexpr,
):
    sequence, tile = find_tile(k_offsets, sequences, BLOCK_N)
    first_row, queries = extent(q_offsets, sequence, queries)
    start, keys = extent(k_offsets, sequence, keys)
    first_key = tile * BLOCK_N
    if first_key >= keys:
        return
    key = first_key + tl.arange(0, BLOCK_N)
    valid = key < keys
    offset = keys - queries if positions is None else 0
    head = first_head + sequence * heads + tl.program_id(1)  # its number for the dropout
    if seed is not None:
        seed = tl.load(seed)
    start += first_key
    q, do = head_of(q, q_sequence, q_head), head_of(do, do_sequence, do_head)
    lse, delta = head_of(lse, lse_sequence, lse_head), head_of(delta, lse_sequence, lse_head)
    k_tile = load_rows(head_of(k, k_sequence, k_head), start, k_row, valid, True, HEAD_DIM, BLOCK_D)
    v_tile = load_rows(head_of(v, v_sequence, v_head), start, v_row, valid, True, HEAD_DIM, BLOCK_D)
    if bias is not None:
        bias += tl.program_id(1) * (2 * bias_reach + 1)
    if c2p is not None:
        c2p = head_of(c2p, c2p_sequence, c2p_head)
    if p2c is not None:
        p2c = head_of(p2c, p2c_sequence, p2c_head) + start.to(tl.int64) * p2c_row
    if dp2c is not None:
        dp2c = head_of(dp2c, dp2c_sequence, dp2c_head) + start.to(tl.int64) * dp2c_row
    DK: tl.constexpr = dk is not None
    DV: tl.constexpr = dv is not None
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # Queries from `below` to `beyond` see all keys of the tile, some from `first` to `below` or up to `last` see a few.
    below, beyond = 0, queries
    if CAUSAL or window is not None:
        ahead = 0 if CAUSAL else window
        first = first_query_from(positions, first_row, queries, offset, first_key - ahead) // BLOCK_M * BLOCK_M
        below = first_query_from(positions, first_row, queries, offset, first_key + BLOCK_N - 1 - ahead)
        below = tl.cdiv(below, BLOCK_M) * BLOCK_M
        begin, end, gap = first, tl.minimum(below, queries), None
        if window is not None:
            beyond = first_query_from(positions, first_row, queries, offset, first_key + window + 1)
            beyond = tl.minimum(beyond // BLOCK_M, tl.cdiv(queries, BLOCK_M)) * BLOCK_M
            below = tl.minimum(below, beyond)
            last = first_query_from(positions, first_row, queries, offset, first_key + BLOCK_N + window)
            begin, end = masked_walk(first, below, beyond, tl.minimum(last, queries), window)
            if window is not None:
                gap = beyond - below
        dk_tile, dv_tile = _dkdv_tiles(
            *(dk_tile, dv_tile, k_tile, v_tile, q, do, lse, delta, bias, bias_reach, c2p, p2c, buckets, buckets_reach),
            *(ranks, dp2c, seed, key, first_key, keys, head, positions, first_row, queries, offset, begin, end, below),
            *(gap, window, q_row, do_row, c2p_row, p2c_row, dp2c_row, scale * LOG2E, threshold, keep_scale),
            *(DK, DV, True, CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION),
        )
    dk_tile, dv_tile = _dkdv_tiles(
        *(dk_tile, dv_tile, k_tile, v_tile, q, do, lse, delta, bias, bias_reach, c2p, p2c, buckets, buckets_reach),
        *(ranks, dp2c, seed, key, first_key, keys, head, positions, first_row, queries, offset, below),
        *(tl.minimum(beyond, queries), below, None, window, q_row, do_row, c2p_row, p2c_row, dp2c_row, scale * LOG2E),
        *(threshold, keep_scale, DK, DV, False, CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION),
    )
    if DK:
        store_rows(head_of(dk, dk_sequence, dk_head), start, dk_row, dk_tile * scale, valid, HEAD_DIM, BLOCK_D)
    if DV:
        store_rows(head_of(dv, dv_sequence, dv_head), start, dv_row, dv_tile, valid, HEAD_DIM, BLOCK_D)
