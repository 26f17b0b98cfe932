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
    tables = [(address(x), 0 if x is None else x.shape[-1] // 2) for x in (call.bias, call.buckets)]
    terms = (*tables[0], *tables[1], rows(call.c2p), rows(call.p2c))
    return offsets, (wide, call.causal, window, call.scale, address(call.seed), call.dropout_p, terms)


def _readable(call: Call) -> Call:
    c2p, p2c = (None if x is None else unit_stride(x) for x in (call.c2p, call.p2c))
    return call._replace(c2p=c2p, p2c=p2c)


def forward(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    query, key, value, call = unit_stride(query), unit_stride(key), unit_stride(value), _readable(call)
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
    call = _readable(call)
    offsets, options = _description(call)
    delta, (dbias, dc2p, dp2c) = torch.empty_like(lse), gradients[3:]
    for gradient in (dc2p, dp2c):
        if gradient is not None:
            gradient.zero_()
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
        rows(dc2p),
        rows(dp2c),
    )
