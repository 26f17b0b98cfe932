"""softmax(scale q kᵀ) v for each sequence and head, dense (N, Q, H, D) or packed (T, H, D) with cu_seqlens.

Forward (online softmax, Milakov and Gimelshein 2018, Dao et al. 2022): a program owns BLOCK_M queries of one head and
walks over the keys in tiles; the running maximum m and sum l rescale the accumulator, and lse = m + log l is kept
(to base 2, as exp2 wants it).
Backward, P = exp(s - lse) recomputed, M the dropout mask times its scale, δ_i = Σ_d dO_id O_id:
    dV = (P M)ᵀ dO,   dP = (dO Vᵀ) M,   dS = P (dP - δ),   dQ = scale dS K,   dK = scale dSᵀ Q.
dQ and dK, dV come from two kernels, so that every output has one writer: no atomics, the same bits every time. The
dK, dV kernel works on transposed tiles, whose P and dS are then first operands of a product and stay in registers.

Bytes: q, k, v, out and lse once for each tile of the other axis, most of it from L2. Operations: 4 Q K D forward,
10 Q K D backward (14 with what both kernels recompute) a head, half of it if causal: tiles above the diagonal are never
touched, those below it carry no mask. Matrix instructions are the bound; with dropout it is the generator (11 integer
operations a weight), so forward and dQ walk in steps of 128 keys and use all that a counter gives; the dK, dV kernel
does where its tile has 128 keys, and with fewer throws the rest away, as float32 does everywhere. A sequence's queries
run from the last to the first: causal work is longest first.
Tiles: tables at the end. Registers decide them: an accumulator of BLOCK_M x D and a tile of BLOCK_M x BLOCK_N must fit.

A query that sees no key has l = 0: it gives 0, and lse = +inf makes its P 0 in backward. Padding up to the tile is
masked by the same rule: lse reads as +inf there.
"""

import dataclasses
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttune.kernels import launch, tuning
from fasttune.kernels.launch import dropout_arguments
from fasttune.kernels.philox import attention_drop_bits, dropped_weights, dropped_weights_transposed

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _locate(cu_seqlens, sequences, queries, keys, BLOCK: tl.constexpr):
    """This program's sequence and tile, and the sequence's first row, queries and keys.

    Packed, sequence s owns the programs from cu_seqlens[s] // BLOCK + s on: at least as many as it has tiles, and the
    grid needs no length but the total. The largest such s is found by bisection; programs without a tile leave.
    """
    if cu_seqlens is None:
        sequence, tile, start = tl.program_id(2), tl.program_id(0), 0
    else:
        program = tl.program_id(0)
        sequence, above = program * 0, program * 0 + sequences
        while sequence + 1 < above:
            middle = (sequence + above) // 2
            before = tl.load(cu_seqlens + middle).to(tl.int32) // BLOCK + middle <= program
            sequence, above = tl.where(before, middle, sequence), tl.where(before, above, middle)
        start = tl.load(cu_seqlens + sequence).to(tl.int32)
        tile = program - start // BLOCK - sequence
        queries = tl.load(cu_seqlens + sequence + 1).to(tl.int32) - start
        keys = queries
    return sequence, tile, start, queries, keys


@triton.jit
def _head(x, sequence_stride, head_stride):
    return x + tl.program_id(2).to(tl.int64) * sequence_stride + tl.program_id(1).to(tl.int64) * head_stride


@triton.jit
def _rows(x, first, row_stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers [ROWS, BLOCK_D] of the rows from `first` on."""
    return x + (first + tl.arange(0, ROWS)).to(tl.int64)[:, None] * row_stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load(pointers, valid, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows where `valid`, zeros beyond HEAD_DIM; without MASKED every row is known to be valid."""
    if MASKED:
        if HEAD_DIM == BLOCK_D:
            return tl.load(pointers, mask=valid[:, None], other=0.0)
        return tl.load(pointers, mask=valid[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store(pointers, value, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = valid[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _forward_tiles(
    acc,
    total,
    m,
    q,
    k,
    v,
    seed,
    query,
    head,
    start,
    keys,
    offset,
    first,
    last,
    k_row,
    v_row,
    scale,
    threshold,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    for first_key in range(first, last, STEP):
        if seed is not None:
            within = 0 if STEP % 128 == 0 else first_key % 128
            bits = attention_drop_bits(seed, query, head, first_key - within, threshold)
        for part in tl.static_range(STEP // BLOCK_N):
            tile_key = first_key + part * BLOCK_N
            key = tile_key + tl.arange(0, BLOCK_N)
            k_tile = _load(_rows(k, start + tile_key, k_row, BLOCK_N, BLOCK_D), key < keys, MASKED, HEAD_DIM, BLOCK_D)
            s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale
            if MASKED:
                visible = (key < keys)[None, :]
                if CAUSAL:
                    visible = visible & (key[None, :] <= query[:, None] + offset)
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
            v_tile = _load(_rows(v, start + tile_key, v_row, BLOCK_N, BLOCK_D), key < keys, MASKED, HEAD_DIM, BLOCK_D)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision=PRECISION)
    return acc, total, m


# Sizes and strides that change with the batch: no new compilation for them.
_RUN_TIME = ["sequences", "queries", "keys", "threshold", "lse_sequence", "lse_head"]


@triton.jit(do_not_specialize=_RUN_TIME)
def attention_forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens,
    seed,
    sequences,
    queries,
    keys,
    q_sequence,
    q_row,
    q_head,
    k_sequence,
    k_row,
    k_head,
    v_sequence,
    v_row,
    v_head,
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
    sequence, tile, start, queries, keys = _locate(cu_seqlens, sequences, queries, keys, BLOCK_M)
    first_query = (tl.cdiv(queries, BLOCK_M) - 1 - tile) * BLOCK_M
    if first_query < 0:
        return
    query = first_query + tl.arange(0, BLOCK_M)
    offset = keys - queries
    head = sequence * tl.num_programs(1) + tl.program_id(1)
    if seed is not None:
        seed = tl.load(seed)
    k, v = _head(k, k_sequence, k_head), _head(v, v_sequence, v_head)
    q_tile = _load(
        _rows(_head(q, q_sequence, q_head), start + first_query, q_row, BLOCK_M, BLOCK_D),
        query < queries,
        True,
        HEAD_DIM,
        BLOCK_D,
    )
    last, full = keys, keys
    if CAUSAL:
        last = tl.minimum(keys, tl.minimum(first_query + BLOCK_M, queries) + offset)
        full = tl.minimum(keys, first_query + offset + 1)
    full = tl.maximum(full, 0) // STEP * STEP  # keys before it are visible to all queries of the tile
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for MASKED in tl.static_range(2):
        acc, total, m = _forward_tiles(
            *(acc, total, m, q_tile, k, v, seed, query, head, start, keys, offset),
            *(full if MASKED else 0, last if MASKED else full, k_row, v_row, scale * LOG2E, threshold),
            *(MASKED, CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_N, STEP, PRECISION),
        )
    seen = total > 0.0
    acc *= tl.where(seen, keep_scale / tl.where(seen, total, 1.0), 0.0)[:, None]
    lse_rows = lse + tl.program_id(2).to(tl.int64) * lse_sequence + tl.program_id(1).to(tl.int64) * lse_head
    log = tl.where(seen, m + tl.log2(tl.where(seen, total, 1.0)), float("inf"))
    tl.store(lse_rows + start + query, log, mask=query < queries)
    out_rows = _rows(_head(out, out_sequence, out_head), start + first_query, out_row, BLOCK_M, BLOCK_D)
    _store(out_rows, acc, query < queries, HEAD_DIM, BLOCK_D)


@triton.jit
def _dq_tiles(
    dq,
    q,
    do,
    lse,
    delta,
    k,
    v,
    seed,
    query,
    head,
    start,
    keys,
    offset,
    first,
    last,
    k_row,
    v_row,
    scale,
    threshold,
    keep_scale,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    for first_key in range(first, last, STEP):
        if seed is not None:
            within = 0 if STEP % 128 == 0 else first_key % 128
            bits = attention_drop_bits(seed, query, head, first_key - within, threshold)
        for part in tl.static_range(STEP // BLOCK_N):
            tile_key = first_key + part * BLOCK_N
            key = tile_key + tl.arange(0, BLOCK_N)
            k_tile = _load(_rows(k, start + tile_key, k_row, BLOCK_N, BLOCK_D), key < keys, MASKED, HEAD_DIM, BLOCK_D)
            v_tile = _load(_rows(v, start + tile_key, v_row, BLOCK_N, BLOCK_D), key < keys, MASKED, HEAD_DIM, BLOCK_D)
            s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale
            p = tl.exp2(s - lse[:, None])
            if MASKED:
                visible = (key < keys)[None, :]
                if CAUSAL:
                    visible = visible & (key[None, :] <= query[:, None] + offset)
                p = tl.where(visible, p, 0.0)
            dp = tl.dot(do, tl.trans(v_tile), input_precision=PRECISION)
            if seed is not None:
                dp = tl.where(dropped_weights(bits, within + part * BLOCK_N, BLOCK_N), 0.0, dp * keep_scale)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=_RUN_TIME)
def attention_dq_kernel(
    do,
    q,
    k,
    v,
    out,
    lse,
    delta,
    dq,
    cu_seqlens,
    seed,
    sequences,
    queries,
    keys,
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
    out_sequence,
    out_row,
    out_head,
    dq_sequence,
    dq_row,
    dq_head,
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
    """Writes δ, which the dK, dV kernel reads, and dQ unless dq is None."""
    sequence, tile, start, queries, keys = _locate(cu_seqlens, sequences, queries, keys, BLOCK_M)
    first_query = (tl.cdiv(queries, BLOCK_M) - 1 - tile) * BLOCK_M
    if first_query < 0:
        return
    query = first_query + tl.arange(0, BLOCK_M)
    valid = query < queries
    offset = keys - queries
    head = sequence * tl.num_programs(1) + tl.program_id(1)
    if seed is not None:
        seed = tl.load(seed)
    do_tile = _load(
        _rows(_head(do, do_sequence, do_head), start + first_query, do_row, BLOCK_M, BLOCK_D),
        valid,
        True,
        HEAD_DIM,
        BLOCK_D,
    )
    out_rows = _rows(_head(out, out_sequence, out_head), start + first_query, out_row, BLOCK_M, BLOCK_D)
    out_tile = _load(out_rows, valid, True, HEAD_DIM, BLOCK_D)
    delta_tile = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    statistic = tl.program_id(2).to(tl.int64) * lse_sequence + tl.program_id(1).to(tl.int64) * lse_head
    tl.store(delta + statistic + start + query, delta_tile, mask=valid)
    if dq is not None:
        lse_tile = tl.load(lse + statistic + start + query, mask=valid, other=float("inf"))
        q_tile = _load(
            _rows(_head(q, q_sequence, q_head), start + first_query, q_row, BLOCK_M, BLOCK_D),
            valid,
            True,
            HEAD_DIM,
            BLOCK_D,
        )
        k, v = _head(k, k_sequence, k_head), _head(v, v_sequence, v_head)
        last, full = keys, keys
        if CAUSAL:
            last = tl.minimum(keys, tl.minimum(first_query + BLOCK_M, queries) + offset)
            full = tl.minimum(keys, first_query + offset + 1)
        full = tl.maximum(full, 0) // STEP * STEP
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for MASKED in tl.static_range(2):
            acc = _dq_tiles(
                *(acc, q_tile, do_tile, lse_tile, delta_tile, k, v, seed, query, head, start, keys, offset),
                *(full if MASKED else 0, last if MASKED else full, k_row, v_row, scale * LOG2E, threshold, keep_scale),
                *(MASKED, CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_N, STEP, PRECISION),
            )
        dq_rows = _rows(_head(dq, dq_sequence, dq_head), start + first_query, dq_row, BLOCK_M, BLOCK_D)
        _store(dq_rows, acc * scale, valid, HEAD_DIM, BLOCK_D)


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
    seed,
    key,
    first_key,
    head,
    start,
    queries,
    offset,
    first,
    last,
    q_row,
    do_row,
    scale,
    threshold,
    keep_scale,
    DIAGONAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    for first_query in range(first, last, BLOCK_M):
        query = first_query + tl.arange(0, BLOCK_M)
        valid = query < queries
        q_tile = _load(_rows(q, start + first_query, q_row, BLOCK_M, BLOCK_D), valid, True, HEAD_DIM, BLOCK_D)
        do_tile = _load(_rows(do, start + first_query, do_row, BLOCK_M, BLOCK_D), valid, True, HEAD_DIM, BLOCK_D)
        lse_tile = tl.load(lse + start + query, mask=valid, other=float("inf"))
        delta_tile = tl.load(delta + start + query, mask=valid, other=0.0)
        s = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION) * scale  # transposed: [keys, queries]
        p = tl.exp2(s - lse_tile[None, :])
        if DIAGONAL:
            p = tl.where(key[:, None] <= query[None, :] + offset, p, 0.0)
        dp = tl.dot(v, tl.trans(do_tile), input_precision=PRECISION)
        kept = p
        if seed is not None:
            dropped = dropped_weights_transposed(
                seed, query, head, first_key // 128 * 128, threshold, first_key % 128, BLOCK_N
            )
            kept = tl.where(dropped, 0.0, p * keep_scale)
            dp = tl.where(dropped, 0.0, dp * keep_scale)
        dv = tl.dot(kept.to(do_tile.dtype), do_tile, dv, input_precision=PRECISION)
        ds = p * (dp - delta_tile[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=_RUN_TIME)
def attention_dkdv_kernel(
    do,
    q,
    k,
    v,
    lse,
    delta,
    dk,
    dv,
    cu_seqlens,
    seed,
    sequences,
    queries,
    keys,
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
    dk_sequence,
    dk_row,
    dk_head,
    dv_sequence,
    dv_row,
    dv_head,
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
    sequence, tile, start, queries, keys = _locate(cu_seqlens, sequences, queries, keys, BLOCK_N)
    first_key = tile * BLOCK_N
    if first_key >= keys:
        return
    key = first_key + tl.arange(0, BLOCK_N)
    valid = key < keys
    offset = keys - queries
    head = sequence * tl.num_programs(1) + tl.program_id(1)
    if seed is not None:
        seed = tl.load(seed)
    q, do = _head(q, q_sequence, q_head), _head(do, do_sequence, do_head)
    statistic = tl.program_id(2).to(tl.int64) * lse_sequence + tl.program_id(1).to(tl.int64) * lse_head
    k_tile = _load(
        _rows(_head(k, k_sequence, k_head), start + first_key, k_row, BLOCK_N, BLOCK_D), valid, True, HEAD_DIM, BLOCK_D
    )
    v_tile = _load(
        _rows(_head(v, v_sequence, v_head), start + first_key, v_row, BLOCK_N, BLOCK_D), valid, True, HEAD_DIM, BLOCK_D
    )
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first, below = 0, 0
    if CAUSAL:  # queries from `below` on see every key of the tile
        first = tl.maximum(first_key - offset, 0) // BLOCK_M * BLOCK_M
        below = tl.cdiv(tl.maximum(first_key + BLOCK_N - 1 - offset, 0), BLOCK_M) * BLOCK_M
        dk_tile, dv_tile = _dkdv_tiles(
            *(dk_tile, dv_tile, k_tile, v_tile, q, do, lse + statistic, delta + statistic, seed, key, first_key, head),
            *(start, queries, offset, first, tl.minimum(below, queries), q_row, do_row, scale * LOG2E, threshold),
            *(keep_scale, True, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION),
        )
    dk_tile, dv_tile = _dkdv_tiles(
        *(dk_tile, dv_tile, k_tile, v_tile, q, do, lse + statistic, delta + statistic, seed, key, first_key, head),
        *(start, queries, offset, below, queries, q_row, do_row, scale * LOG2E, threshold),
        *(keep_scale, False, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION),
    )
    if dk is not None:
        dk_rows = _rows(_head(dk, dk_sequence, dk_head), start + first_key, dk_row, BLOCK_N, BLOCK_D)
        _store(dk_rows, dk_tile * scale, valid, HEAD_DIM, BLOCK_D)
    if dv is not None:
        dv_rows = _rows(_head(dv, dv_sequence, dv_head), start + first_key, dv_row, BLOCK_N, BLOCK_D)
        _store(dv_rows, dv_tile, valid, HEAD_DIM, BLOCK_D)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """BLOCK_M queries by BLOCK_N keys; warps of 32 lanes; stages of the software pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# (target, padded head dimension, kernel, dropout) -> tiles. Chosen ahead of time so that nothing spills and as many
# blocks fit a multiprocessor as registers allow (benchmarks/gpu_budgets.toml); not yet timed on hardware.
TILES = {
    ("sm80", 64, "forward", False): Tiles(128, 64, 8, 2),
    ("sm80", 64, "forward", True): Tiles(128, 64, 8, 2),
    ("sm80", 64, "dq", False): Tiles(128, 64, 8, 2),
    ("sm80", 64, "dq", True): Tiles(32, 128, 4, 1),
    ("sm80", 64, "dkdv", False): Tiles(32, 128, 8, 2),
    ("sm80", 64, "dkdv", True): Tiles(32, 128, 8, 2),
    ("sm80", 128, "forward", False): Tiles(64, 64, 8, 2),
    ("sm80", 128, "forward", True): Tiles(64, 128, 8, 1),
    ("sm80", 128, "dq", False): Tiles(64, 64, 8, 2),
    ("sm80", 128, "dq", True): Tiles(32, 128, 8, 1),
    ("sm80", 128, "dkdv", False): Tiles(64, 64, 8, 2),
    ("sm80", 128, "dkdv", True): Tiles(64, 64, 8, 2),
    ("sm90", 64, "forward", False): Tiles(128, 64, 8, 2),
    ("sm90", 64, "forward", True): Tiles(128, 64, 8, 2),
    ("sm90", 64, "dq", False): Tiles(64, 64, 4, 2),
    ("sm90", 64, "dq", True): Tiles(64, 64, 4, 2),
    ("sm90", 64, "dkdv", False): Tiles(64, 128, 8, 2),
    ("sm90", 64, "dkdv", True): Tiles(32, 128, 8, 2),
    ("sm90", 128, "forward", False): Tiles(128, 64, 8, 2),
    ("sm90", 128, "forward", True): Tiles(64, 64, 8, 2),
    ("sm90", 128, "dq", False): Tiles(128, 64, 8, 2),
    ("sm90", 128, "dq", True): Tiles(128, 32, 8, 2),
    ("sm90", 128, "dkdv", False): Tiles(64, 64, 8, 2),
    ("sm90", 128, "dkdv", True): Tiles(32, 128, 8, 1),
    ("sm100", 64, "dkdv", False): Tiles(64, 64, 4, 2),  # the rest of sm100 takes sm80's
    ("sm100", 128, "dkdv", False): Tiles(64, 64, 8, 2),
    ("gfx942", 64, "forward", False): Tiles(128, 64, 8, 2),
    ("gfx942", 64, "forward", True): Tiles(128, 64, 8, 2),
    ("gfx942", 64, "dq", False): Tiles(64, 64, 4, 2),
    ("gfx942", 64, "dq", True): Tiles(64, 64, 4, 2),
    ("gfx942", 64, "dkdv", False): Tiles(64, 128, 8, 2),
    ("gfx942", 64, "dkdv", True): Tiles(32, 128, 8, 2),
    ("gfx942", 128, "forward", False): Tiles(128, 64, 8, 2),
    ("gfx942", 128, "forward", True): Tiles(128, 64, 8, 2),
    ("gfx942", 128, "dq", False): Tiles(64, 64, 8, 1),
    ("gfx942", 128, "dq", True): Tiles(64, 64, 8, 1),
    ("gfx942", 128, "dkdv", False): Tiles(32, 64, 8, 1),
    ("gfx942", 128, "dkdv", True): Tiles(32, 64, 8, 1),
}
# What tuning tries beside them, in 16 bits: deeper pipelines, and a tile that may spill but reads less.
MORE_TILES = (Tiles(64, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 2))
# No matrix instructions in IEEE float32: a thread multiplies whole rows of head_dim elements, held in registers.
FLOAT32_TILES = {
    (64, "forward"): Tiles(32, 32, 4, 1),
    (64, "dq"): Tiles(16, 32, 4, 1),
    (64, "dkdv"): Tiles(32, 32, 4, 1),
    (128, "forward"): Tiles(16, 32, 4, 1),
    (128, "dq"): Tiles(16, 16, 4, 1),
    (128, "dkdv"): Tiles(16, 16, 4, 1),
}
INTERPRETED_TILES = {
    "forward": Tiles(64, 128, 1, 1),
    "dq": Tiles(128, 64, 1, 1),
    "dkdv": Tiles(64, 64, 1, 1),
}


def tiles(kernel: str, block_d: int, dtype: torch.dtype, dropout: bool) -> Tiles:
    target = launch.target()
    if target == "interpreter":
        return INTERPRETED_TILES[kernel]
    if dtype == torch.float32:
        return FLOAT32_TILES[max(64, block_d), kernel]
    known = target if (target, 64, kernel, dropout) in TILES else ("gfx942" if target.startswith("gfx") else "sm80")
    return TILES[known, max(64, block_d), kernel, dropout]


def _tile(kernel: str, query: Tensor, causal: bool, seed: Tensor | None, launch_with: Callable[[Tiles], None]) -> Tiles:
    """The table's tile or, with FASTTUNE_AUTOTUNE=1, the fastest of those for any target and of MORE_TILES."""
    block_d, dropout = launch.power_of_two(query.shape[-1], 16), seed is not None
    default = tiles(kernel, block_d, query.dtype, dropout)
    kind = f"attention {kernel} {block_d} {query.dtype} causal={causal} dropout={dropout}"
    if query.dtype == torch.float32:
        candidates = [tile for (_, name), tile in FLOAT32_TILES.items() if name == kernel]
    else:
        candidates = [
            tile for (_, width, name, _), tile in TILES.items() if (width, name) == (max(64, block_d), kernel)
        ]
        candidates += MORE_TILES
    return tuning.choose(kind, default, candidates, launch_with, query.device)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, ...]:
    """Strides of sequence, row and head of (N, S, H, D) or (T, H, D)."""
    if x is None:
        return (0, 0, 0)
    strides = x.stride()
    return strides[:3] if len(strides) == 4 else (0, *strides[:2])


def _geometry(query: Tensor, key: Tensor, cu_seqlens: Tensor | None) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """(sequences, queries, keys) and the strides of sequence and head of lse, (N, H, S) or (H, T)."""
    if cu_seqlens is None:
        sequences, queries, heads, _ = query.shape
        return (sequences, queries, key.shape[1]), (heads * queries, queries)
    rows = query.shape[0]
    return (cu_seqlens.shape[0] - 1, rows, rows), (0, rows)


def _grid(rows: int, block: int, sequences: int, heads: int, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    if cu_seqlens is None:
        return triton.cdiv(rows, block), heads, sequences
    return rows // block + sequences, heads, 1


def _constants(query: Tensor, causal: bool) -> dict[str, object]:
    head_dim = query.shape[-1]
    return {
        "CAUSAL": causal,
        "HEAD_DIM": head_dim,
        "BLOCK_D": launch.power_of_two(head_dim, 16),
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",  # tf32 concerns float32 alone
    }


def _tile_constants(tile: Tiles) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": launch.warps(tile.warps),
        "num_stages": tile.stages,
    }


def _step(tile: Tiles, dtype: torch.dtype, seed: Tensor | None) -> int:
    """Keys a step of the loop: with dropout all that a counter serves; float32 has no registers for that."""
    return tile.block_n if seed is None or dtype == torch.float32 else max(128, tile.block_n)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """fasttune::attention: (out, lse); lse to base 2, float32 (N, H, Q) or (H, T), +inf where no key is seen."""
    query, key, value = _unit_stride(query), _unit_stride(key), _unit_stride(value)
    sizes, lse_strides = _geometry(query, key, cu_seqlens)
    heads = query.shape[-2]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((*query.shape[:-3], heads, query.shape[-3]), dtype=torch.float32, device=query.device)
    if not out.numel():
        return out, lse
    threshold, keep_scale = dropout_arguments(seed, dropout_p)
    constants = _constants(query, causal)

    def launch_with(tile: Tiles) -> None:
        attention_forward_kernel[_grid(sizes[1], tile.block_m, sizes[0], heads, cu_seqlens)](
            *(query, key, value, out, lse, cu_seqlens, seed, *sizes),
            *(*_strides(query), *_strides(key), *_strides(value), *_strides(out), *lse_strides),
            *(scale, threshold, keep_scale),
            STEP=_step(tile, query.dtype, seed),
            **_tile_constants(tile),
            **constants,
        )

    launch_with(_tile("forward", query, causal, seed, launch_with))
    return out, lse


def _run_backward(
    dout: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> None:
    """Fills the gradients of query, key and value, in any strides; None for those nobody needs."""
    query, key, value, out, lse = tensors
    dout, query, key, value = _unit_stride(dout), _unit_stride(query), _unit_stride(key), _unit_stride(value)
    dq, dk, dv = gradients
    if not query.numel() or not key.numel():
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return
    sizes, lse_strides = _geometry(query, key, cu_seqlens)
    heads = query.shape[-2]
    delta = torch.empty_like(lse)
    threshold, keep_scale = dropout_arguments(seed, dropout_p)
    constants = _constants(query, causal)
    inputs = (*_strides(dout), *_strides(query), *_strides(key), *_strides(value))
    options = (*lse_strides, scale, threshold, keep_scale)

    def launch_dq(tile: Tiles) -> None:
        attention_dq_kernel[_grid(sizes[1], tile.block_m, sizes[0], heads, cu_seqlens)](
            *(dout, query, key, value, out, lse, delta, dq, cu_seqlens, seed, *sizes),
            *(*inputs, *_strides(out), *_strides(dq), *options),
            STEP=_step(tile, query.dtype, seed),
            **_tile_constants(tile),
            **constants,
        )

    def launch_dkdv(tile: Tiles) -> None:
        attention_dkdv_kernel[_grid(sizes[2], tile.block_n, sizes[0], heads, cu_seqlens)](
            *(dout, query, key, value, lse, delta, dk, dv, cu_seqlens, seed, *sizes),
            *(*inputs, *_strides(dk), *_strides(dv), *options),
            **_tile_constants(tile),
            **constants,
        )

    launch_dq(_tile("dq", query, causal, seed, launch_dq))
    if dk is not None or dv is not None:
        launch_dkdv(_tile("dkdv", query, causal, seed, launch_dkdv))


def backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """fasttune::attention_backward: the gradients of query, key and value, empty where not needed."""
    dq, dk, dv = (
        torch.empty(x.shape if need else (0,), dtype=x.dtype, device=x.device)
        for x, need in zip((query, key, value), needed, strict=True)
    )
    wanted = (dq if needed[0] else None, dk if needed[1] else None, dv if needed[2] else None)
    _run_backward(dout, (query, key, value, out, lse), wanted, cu_seqlens, seed, causal, scale, dropout_p)
    return dq, dk, dv


def packed_qkv_forward(qkv: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """fasttune::attention_packed_qkv, qkv (..., 3, H, D)."""
    return forward(*qkv.unbind(-3), *rest)


def packed_qkv_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """fasttune::attention_packed_qkv_backward: one gradient of qkv's shape."""
    gradient = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dq, dk, dv = gradient.unbind(-3)
    _run_backward(dout, (*qkv.unbind(-3), out, lse), (dq, dk, dv), cu_seqlens, seed, causal, scale, dropout_p)
    return gradient
