"""Attention in torch operators: explicit scores, mask, softmax and dropout mask. Any floating dtype, any head size."""

from __future__ import annotations

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
    return _dense(query, key, value, _seen(every, positions, call), call)


def _seen(keys: Tensor, positions: Tensor, call: Call) -> Tensor:
    """Which keys are seen, (..., Q, K): of those that there are, (..., 1, K), by queries at positions (..., Q)."""
    ahead = torch.arange(keys.shape[-1], device=keys.device) - positions.unsqueeze(-1)
    if call.causal:
        keys = keys & (ahead <= 0)
    if call.window is not None:
        keys = keys & (ahead.abs() <= call.window)
    return keys


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    call: Call,
    positions: Tensor | None = None,
) -> Tensor:
    """visible: bool, broadcast to (N, H, Q, K); positions: of the queries, broadcast to (N, H, Q), None for 0, 1, ...
    Rows that see no key give 0 and pass no gradient."""
    sequences, queries, heads, _ = query.shape
    keys = key.shape[1]
    compute = query.dtype if query.dtype == torch.float64 else torch.float32
    q, k, v = (tensor.to(compute).transpose(1, 2) for tensor in (query, key, value))  # (N, H, rows, D)
    scores = (q @ k.transpose(-1, -2)) * call.scale
    weights = scores.masked_fill(~visible, torch.finfo(compute).min).softmax(-1).masked_fill(~visible, 0.0)
    if call.seed is not None:
        rows = torch.arange(queries, device=query.device) if positions is None else positions
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
        return (query * 0.0 + key * 0.0 + value * 0.0).contiguous()
    if max_seqlen is None:
        max_seqlen = rows if _unknown(cu_seqlens) else int(lengths.max())
    inside, source = _padding(cu_seqlens, lengths, max_seqlen)
    q, k, v = (x.index_select(0, source).unflatten(0, (sequences, max_seqlen)) for x in (query, key, value))
    visible = _seen(inside.view(sequences, 1, 1, max_seqlen), torch.arange(max_seqlen, device=query.device), call)
    out = _dense(q, k, v, visible, call)
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
        return (query * 0.0 + key.sum() * 0.0 + value.sum() * 0.0).contiguous()
    counts, lengths = cu_seqlens_q.diff().long(), cu_seqlens.diff().long()
    most = rows if _unknown(cu_seqlens_q) else int(counts.max())
    longest = max_seqlen or (key.shape[0] if _unknown(cu_seqlens) else int(lengths.max()))
    chosen, source_q = _padding(cu_seqlens_q, counts, most)
    inside, source = _padding(cu_seqlens, lengths, longest)
    q = query.index_select(0, source_q).unflatten(0, (sequences, most))
    k, v = (x.index_select(0, source).unflatten(0, (sequences, longest)) for x in (key, value))
    positions = torch.where(chosen, positions_q.index_select(0, source_q).view(sequences, most), 0).long()
    visible = _seen(inside.unsqueeze(1), positions, call)
    out = _dense(q, k, v, visible.unsqueeze(1), call, positions.unsqueeze(1))
    row = torch.arange(rows, device=query.device)
    sequence = torch.bucketize(row, cu_seqlens_q[1:].long(), right=True)
    return out.flatten(0, 1).index_select(0, sequence * most + row - cu_seqlens_q[:-1].long()[sequence])


def _unknown(offsets: Tensor) -> bool:
    """Whether the lengths cannot be looked at, or would be taken for constants."""
    return torch.compiler.is_compiling() or offsets.is_meta or _transforms.tracing()


def _padding(offsets: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Which places of (N, longest) hold a row, and the row of each place, 0 where there is none."""
    position = torch.arange(longest, device=offsets.device)
    inside = position < lengths.unsqueeze(1)
    return inside, torch.where(inside, offsets[:-1].long().unsqueeze(1) + position, 0).flatten()
