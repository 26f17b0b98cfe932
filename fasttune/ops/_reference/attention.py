"""Attention in torch operators: explicit scores, mask, softmax and dropout mask. Any floating dtype, any head size."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune.ops._reference.philox import attention_keep_mask, keep_scale

# Shape legend: N sequences, Q queries and K keys of each, H heads, D head dimension; packed: T rows in all.


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """(N, Q, H, D), (N, K, H, D), (N, K, H, D) -> (N, Q, H, D); packed: (T, H, D) thrice -> (T, H, D)."""
    if cu_seqlens is not None:
        return _packed(query, key, value, cu_seqlens, max_seqlen, seed, causal, scale, dropout_p)
    queries, keys = query.shape[1], key.shape[1]
    visible = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
    if causal:
        visible = visible.tril(keys - queries)  # query i sees keys j <= i + K - Q
    return _dense(query, key, value, visible, seed, scale, dropout_p)


def _dense(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, seed: Tensor | None, scale: float, dropout_p: float
) -> Tensor:
    """visible: bool, broadcast to (N, H, Q, K). Rows that see no key give 0 and pass no gradient."""
    sequences, queries, heads, _ = query.shape
    keys = key.shape[1]
    compute = query.dtype if query.dtype == torch.float64 else torch.float32
    q, k, v = (tensor.to(compute).transpose(1, 2) for tensor in (query, key, value))  # (N, H, rows, D)
    scores = (q @ k.transpose(-1, -2)) * scale
    weights = scores.masked_fill(~visible, torch.finfo(compute).min).softmax(-1).masked_fill(~visible, 0.0)
    if seed is not None:
        rows = torch.arange(queries, device=query.device)
        sequence_heads = torch.arange(sequences * heads, device=query.device).view(sequences, heads, 1)
        kept = attention_keep_mask(rows, sequence_heads, keys, seed, dropout_p)
        weights = torch.where(kept, weights * keep_scale(dropout_p), torch.zeros((), dtype=compute, device=q.device))
    return (weights @ v).transpose(1, 2).to(query.dtype).contiguous()


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Pads to (N, longest, H, D), attends, and takes the rows back."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    rows, sequences = query.shape[0], starts.shape[0]
    if rows == 0:
        return (query * 0.0 + key * 0.0 + value * 0.0).contiguous()
    if max_seqlen is None:
        max_seqlen = rows if torch.compiler.is_compiling() else int(lengths.max())
    position = torch.arange(max_seqlen, device=query.device)
    inside = position < lengths.unsqueeze(1)  # (N, longest)
    source = torch.where(inside, starts.unsqueeze(1) + position, 0).flatten()
    q, k, v = (x.index_select(0, source).unflatten(0, (sequences, max_seqlen)) for x in (query, key, value))
    visible = inside.view(sequences, 1, 1, max_seqlen)
    if causal:
        visible = visible & torch.ones(max_seqlen, max_seqlen, dtype=torch.bool, device=query.device).tril()
    out = _dense(q, k, v, visible, seed, scale, dropout_p)
    row = torch.arange(rows, device=query.device)
    sequence = torch.bucketize(row, cu_seqlens[1:].long(), right=True)
    return out.flatten(0, 1).index_select(0, sequence * max_seqlen + row - starts[sequence])


def attention_of_chosen_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    positions_q: Tensor,
    max_seqlen: int | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Attends with zeros for the queries that were not chosen, and takes the chosen rows: (R, H, D), (T, H, D) twice
    -> (R, H, D). Of several queries at one position the first in a first turn, the second in a second, and so on."""
    sequence = torch.bucketize(torch.arange(query.shape[0], device=query.device), cu_seqlens_q[1:].long(), right=True)
    places = cu_seqlens[:-1].long()[sequence] + positions_q
    rows = torch.arange(places.numel(), device=places.device)
    turns = rows - torch.searchsorted(places, places)
    out = torch.zeros_like(query)
    for turn in range(int(turns.max()) + 1 if turns.numel() else 1):
        now = (turns == turn).nonzero().squeeze(1)
        every = query.new_zeros(key.shape).index_copy(0, places[now], query.index_select(0, now))
        attended = attention(every, key, value, cu_seqlens, max_seqlen, seed, causal, scale, dropout_p)
        out = out.index_copy(0, now, attended.index_select(0, places[now]))
    return out
