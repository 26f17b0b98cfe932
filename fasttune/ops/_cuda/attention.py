"""csrc/cuda/attention_forward.cu and csrc/cuda/attention_backward.cu. lse is to base 2, like the Triton kernels'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _cuda
from fasttune.ops._cpp import DTYPE_CODES, address

# Shape legend: as in fasttune/ops/attention.py.


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor | None) -> tuple[int, ...]:
    """Address and strides of sequence, row and head of (B, S, H, D) or (T, H, D); zeros for None."""
    if x is None:
        return (0, 0, 0, 0)
    strides = x.stride()
    return (x.data_ptr(), *strides[:3]) if len(strides) == 4 else (x.data_ptr(), 0, *strides[:2])


def _sizes(query: Tensor, key: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int, int]:
    """Sequences, queries, keys, heads, head dimension."""
    if cu_seqlens is None:
        sequences, queries, heads, head_dim = query.shape
        return sequences, queries, key.shape[1], heads, head_dim
    return cu_seqlens.shape[0] - 1, query.shape[0], key.shape[0], query.shape[1], query.shape[2]


def _offsets(
    cu_seqlens: Tensor | None, cu_seqlens_q: Tensor | None, positions_q: Tensor | None
) -> tuple[list[Tensor | None], bool]:
    """As the library reads them: both offsets in one dtype, positions int32; and whether the offsets are int64."""
    if cu_seqlens_q is not None and positions_q is not None:
        assert cu_seqlens is not None
        cu_seqlens_q, positions_q = cu_seqlens_q.to(cu_seqlens.dtype), positions_q.to(torch.int32)
    wide = cu_seqlens is not None and cu_seqlens.dtype == torch.int64
    return [_cuda.contiguous(part) for part in (cu_seqlens, cu_seqlens_q, positions_q)], wide


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
    cu_seqlens_q: Tensor | None = None,
    positions_q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """fasttune::attention."""
    query, key, value = _unit_stride(query), _unit_stride(key), _unit_stride(value)
    offsets, wide = _offsets(cu_seqlens, cu_seqlens_q, positions_q)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse_shape = (*query.shape[:-3], query.shape[-2], query.shape[-3])
    lse = torch.empty(lse_shape, dtype=torch.float32, device=query.device)
    _cuda.call(
        "attention_forward",
        query,
        DTYPE_CODES[query.dtype],
        _sizes(query, key, cu_seqlens),
        _rows(query),
        _rows(key),
        _rows(value),
        _rows(out),
        lse.data_ptr(),
        list(map(address, offsets)),
        wide,
        causal,
        scale,
        address(seed),
        dropout_p,
    )
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
    cu_seqlens_q: Tensor | None = None,
    positions_q: Tensor | None = None,
) -> None:
    query, key, value, out, lse = tensors
    query, key, value, dout = _unit_stride(query), _unit_stride(key), _unit_stride(value), _unit_stride(dout)
    offsets, wide = _offsets(cu_seqlens, cu_seqlens_q, positions_q)
    delta = torch.empty_like(lse)
    _cuda.call(
        "attention_backward",
        query,
        DTYPE_CODES[query.dtype],
        _sizes(query, key, cu_seqlens),
        _rows(query),
        _rows(key),
        _rows(value),
        _rows(out),
        lse.data_ptr(),
        _rows(dout),
        *(_rows(gradient) for gradient in gradients),
        delta.data_ptr(),
        list(map(address, offsets)),
        wide,
        causal,
        scale,
        address(seed),
        dropout_p,
    )


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
    cu_seqlens_q: Tensor | None = None,
    positions_q: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """fasttune::attention_backward: a gradient that nobody needs is an empty tensor."""
    gradients = [
        torch.empty(x.shape if need else (0,), dtype=x.dtype, device=x.device)
        for x, need in zip((query, key, value), needed, strict=True)
    ]
    dquery, dkey, dvalue = (x if need else None for x, need in zip(gradients, needed, strict=True))
    tensors = (query, key, value, out, lse)
    wanted = (dquery, dkey, dvalue)
    _run_backward(dout, tensors, wanted, cu_seqlens, seed, causal, scale, dropout_p, cu_seqlens_q, positions_q)
    return tuple(gradients)


def chosen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    positions_q: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """fasttune::attention_chosen_queries."""
    every = (*options, cu_seqlens_q, positions_q)
    return forward(query, key, value, cu_seqlens, *every)


def chosen_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    positions_q: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    """fasttune::attention_chosen_queries_backward."""
    every = (*options, cu_seqlens_q, positions_q)
    return backward(dout, query, key, value, out, lse, cu_seqlens, *every)


def packed_qkv_forward(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """fasttune::attention_packed_qkv."""
    query, key, value = qkv.unbind(-3)
    return forward(query, key, value, *rest)


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
    """fasttune::attention_packed_qkv_backward."""
    gradient = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    query, key, value = qkv.unbind(-3)
    dquery, dkey, dvalue = gradient.unbind(-3)
    tensors = (query, key, value, out, lse)
    _run_backward(dout, tensors, (dquery, dkey, dvalue), cu_seqlens, seed, causal, scale, dropout_p)
    return gradient
