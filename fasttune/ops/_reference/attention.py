"""Attention in torch operators: explicit scores, mask, softmax and dropout mask. Any floating dtype, any head size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _transforms
from fasttune.ops._attention_call import Call
from fasttune.ops._reference.philox import attention_keep_mask, keep_scale

# Shape legend: N sequences, Q queries and K keys of each, H heads, D head dimension; packed: T rows in all.


def attention(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    """(N, Q, H, D), (N, K, H, D), (N, K, H, D) -> (N, Q, H, D); packed: (T, H, D) thrice -> (T, H, D); queries of some
    positions only: (R, H, D), (T, H, D) twice -> (R, H, D)."""
    if call.positions_q is not None:
        return _of_chosen_queries(query, key, value, call)
    if call.cu_seqlens is not None:
        return _packed(query, key, value, call)
    queries, keys = query.shape[1], key.shape[1]
    positions = torch.arange(keys - queries, keys, device=query.device)  # aligned at the last query and the last key
    every = torch.ones(1, keys, dtype=torch.bool, device=query.device)
    return _dense(query, key, value, call, every, positions, torch.arange(queries, device=query.device))


def _dense(
    query: Tensor, key: Tensor, value: Tensor, call: Call, keys_there: Tensor, positions: Tensor, rows: Tensor
) -> Tensor:
    """keys_there: which keys there are, bool, broadcast to (N, H, 1, K); positions: of the queries, and rows: what
    dropout knows them by, broadcast to (N, H, Q). Rows that see no key give 0 and pass no gradient."""
    sequences, _, heads, _ = query.shape
    keys = key.shape[1]
    compute = query.dtype if query.dtype == torch.float64 else torch.float32
    q, k, v = (tensor.to(compute).transpose(1, 2) for tensor in (query, key, value))  # (N, H, rows, D)
    ahead = torch.arange(keys, device=query.device) - positions.unsqueeze(-1)
    ahead = ahead if ahead.dim() == 4 else ahead[None, None]  # (1 or N, 1, Q, K)
    visible = keys_there
    if call.causal:
        visible = visible & (ahead <= 0)
    if call.window is not None:
        visible = visible & (ahead.abs() <= call.window)
    scores = q @ k.transpose(-1, -2)
    if call.buckets is not None:
        bucket = _at(call.buckets.long(), ahead).expand(scores.shape)
        if call.c2p is not None:
            scores = scores + call.c2p.to(compute).transpose(1, 2).gather(-1, bucket)
        if call.p2c is not None:
            of_keys = call.p2c.to(compute).transpose(1, 2).gather(-1, bucket.transpose(-1, -2))
            scores = scores + of_keys.transpose(-1, -2)
    scores = scores * call.scale
    if call.bias is not None:
        scores = scores + _at(call.bias.t(), ahead.squeeze(1)).movedim(-1, 1)
    weights = scores.masked_fill(~visible, torch.finfo(compute).min).softmax(-1).masked_fill(~visible, 0.0)
    if call.seed is not None:
        sequence_heads = torch.arange(sequences * heads, device=query.device).view(sequences, heads, 1)
        kept = attention_keep_mask(rows, sequence_heads, keys, call.seed, call.dropout_p)
        weights = torch.where(
            kept, weights * keep_scale(call.dropout_p), torch.zeros((), dtype=compute, device=q.device)
        )
    return (weights @ v).transpose(1, 2).to(query.dtype).contiguous()


def _packed(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    """Pads to (N, longest, H, D), attends, and takes the rows back."""
    cu_seqlens, max_seqlen = call.cu_seqlens, call.max_seqlen
    assert cu_seqlens is not None
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    rows, sequences = query.shape[0], starts.shape[0]
    if rows == 0:
        return _nothing(query, key, value, call)
    if max_seqlen is None:
        max_seqlen = rows if _unknown(cu_seqlens) else int(lengths.max())
    inside, source = _padding(cu_seqlens, lengths, max_seqlen)
    terms = (query, key, value, call.c2p, call.p2c)
    q, k, v, c2p, p2c = (_laid_out(x, source, sequences, max_seqlen) for x in terms)
    padded = call._replace(c2p=c2p, p2c=p2c)
    positions = torch.arange(max_seqlen, device=query.device)
    out = _dense(q, k, v, padded, inside.view(sequences, 1, 1, max_seqlen), positions, positions)
    row = torch.arange(rows, device=query.device)
    sequence = torch.bucketize(row, cu_seqlens[1:].long(), right=True)
    return out.flatten(0, 1).index_select(0, sequence * max_seqlen + row - starts[sequence])


def _of_chosen_queries(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    """Pads queries to (N, most, H, D) and keys to (N, longest, H, D)."""
    cu_seqlens, cu_seqlens_q, positions_q, max_seqlen = call[:4]
    assert cu_seqlens is not None
    assert cu_seqlens_q is not None
    assert positions_q is not None
    rows, sequences = query.shape[0], cu_seqlens.shape[0] - 1
    if rows == 0 or key.shape[0] == 0:
        return _nothing(query, key, value, call)
    counts, lengths = cu_seqlens_q.diff().long(), cu_seqlens.diff().long()
    most = rows if _unknown(cu_seqlens_q) else int(counts.max())
    longest = max_seqlen or (key.shape[0] if _unknown(cu_seqlens) else int(lengths.max()))
    chosen, source_q = _padding(cu_seqlens_q, counts, most)
    inside, source = _padding(cu_seqlens, lengths, longest)
    q, c2p = (_laid_out(x, source_q, sequences, most) for x in (query, call.c2p))
    k, v, p2c = (_laid_out(x, source, sequences, longest) for x in (key, value, call.p2c))
    positions = torch.where(chosen, positions_q.index_select(0, source_q).view(sequences, most), 0).long()
    padded, inside, positions = (
        call._replace(c2p=c2p, p2c=p2c),
        inside.view(sequences, 1, 1, longest),
        positions[:, None],
    )
    out = _dense(q, k, v, padded, inside, positions, positions)
    row = torch.arange(rows, device=query.device)
    sequence = torch.bucketize(row, cu_seqlens_q[1:].long(), right=True)
    return out.flatten(0, 1).index_select(0, sequence * most + row - cu_seqlens_q[:-1].long()[sequence])


def _nothing(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    """Zeros for queries that see no key, with a gradient for each tensor."""
    others = (key, value, call.bias, call.c2p, call.p2c)
    return sum((x.sum().to(query.dtype) * 0.0 for x in others if x is not None), query * 0.0).contiguous()


def _at(table: Tensor, ahead: Tensor) -> Tensor:
    """Rows of a table (2 R + 1, ...) by distance, clamped to R."""
    furthest = table.shape[0] // 2
    return table[ahead.clamp(-furthest, furthest) + furthest]


def _laid_out(x: Tensor | None, source: Tensor, sequences: int, longest: int) -> Any:
    """Rows (T, ...) as (N, longest, ...)."""
    return None if x is None else x.index_select(0, source).unflatten(0, (sequences, longest))


def _unknown(offsets: Tensor) -> bool:
    """Whether the lengths cannot be looked at, or would be taken for constants."""
    return torch.compiler.is_compiling() or offsets.is_meta or _transforms.tracing()


def _padding(offsets: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Which places of (N, longest) hold a row, and the row of each place, 0 where there is none."""
    position = torch.arange(longest, device=offsets.device)
    inside = position < lengths.unsqueeze(1)
    return inside, torch.where(inside, offsets[:-1].long().unsqueeze(1) + position, 0).flatten()
