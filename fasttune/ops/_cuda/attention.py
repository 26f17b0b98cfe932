"""csrc/cuda/attention_forward.cu and csrc/cuda/attention_backward.cu. lse is to base 2, like the Triton kernels'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _cuda
from fasttune.ops._attention_call import Call, rows, unit_stride
from fasttune.ops._cpp import DTYPE_CODES, address

# Shape legend: as in fasttune/ops/attention.py.


BLOCKS = 4  # that add up gradients of terms, for each multiprocessor


def _description(call: Call) -> tuple[list[Tensor | None], tuple[Any, ...]]:
    """What the library reads of a call behind the tensors: both offsets in one dtype, positions int32; whether the
    offsets are int64, the variant, and the terms."""
    cu_seqlens, cu_seqlens_q, positions_q = call.cu_seqlens, call.cu_seqlens_q, call.positions_q
    if cu_seqlens_q is not None and positions_q is not None:
        assert cu_seqlens is not None
        cu_seqlens_q, positions_q = cu_seqlens_q.to(cu_seqlens.dtype), positions_q.to(torch.int32)
    wide = cu_seqlens is not None and cu_seqlens.dtype == torch.int64
    offsets = [_cuda.contiguous(part) for part in (cu_seqlens, cu_seqlens_q, positions_q)]
    window = -1 if call.window is None else call.window
    furthest = 0 if call.bias is None else call.bias.shape[1] // 2
    terms = (furthest, address(call.bias))
    return offsets, (wide, call.causal, window, call.scale, address(call.seed), call.dropout_p, terms)


def forward(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    offsets, options = _description(call)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse_shape = (*query.shape[:-3], query.shape[-2], query.shape[-3])
    lse = torch.empty(lse_shape, dtype=torch.float32, device=query.device)
    _cuda.call(
        "attention_forward",
        query,
        DTYPE_CODES[query.dtype],
        call.sizes(query, key),
        *map(rows, (query, key, value, out)),
        lse.data_ptr(),
        list(map(address, offsets)),
        *options,
    )
    return out, lse


def backward(
    dout: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    gradients: Sequence[Tensor | None],
    call: Call,
) -> None:
    query, key, value, out, lse = tensors
    query, key, value, dout = unit_stride(query), unit_stride(key), unit_stride(value), unit_stride(dout)
    offsets, options = _description(call)
    delta, dbias = torch.empty_like(lse), gradients[3]
    partials = max(1, BLOCKS * _cuda.multiprocessors(query.device) // query.shape[-2])
    partial = None if dbias is None else dbias.new_empty((partials, *dbias.shape))
    _cuda.call(
        "attention_backward",
        query,
        DTYPE_CODES[query.dtype],
        call.sizes(query, key),
        *map(rows, (query, key, value, out)),
        lse.data_ptr(),
        rows(dout),
        *map(rows, gradients[:3]),
        delta.data_ptr(),
        list(map(address, offsets)),
        *options,
        address(dbias),
        address(partial),
        partials,
    )
