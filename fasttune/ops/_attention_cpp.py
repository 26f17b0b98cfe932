"""csrc/cpu/attention_forward.cpp and csrc/cpu/attention_backward.cpp. lse is the natural logarithm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _cpp
from fasttune.ops._attention_call import Call, rows, unit_stride
from fasttune.ops._attention_checks import check_offsets, check_positions

# Shape legend: as in fasttune/ops/attention.py.


def _of_unit_stride(call: Call) -> Call:
    if call.buckets is None:
        return call
    c2p, p2c = (None if x is None else unit_stride(x) for x in (call.c2p, call.p2c))
    return call._replace(c2p=c2p, p2c=p2c)


def _description(call: Call) -> tuple[Any, ...]:
    """What the library reads of a call behind the tensors: offsets as int64, int64, int32."""
    wide = [
        None if part is None else part.to(torch.int64).contiguous() for part in (call.cu_seqlens, call.cu_seqlens_q)
    ]
    positions = None if call.positions_q is None else call.positions_q.to(torch.int32).contiguous()
    return (*wide, positions), (
        _terms(call),
        call.causal,
        -1 if call.window is None else call.window,
        call.scale,
        _cpp.address(call.seed),
        call.dropout_p,
    )


def _terms(call: Call) -> tuple[Any, ...]:
    """Addresses of bias and buckets, rows of c2p and p2c, number of buckets, furthest distance of each table."""
    by_bucket = next((x for x in (call.c2p, call.p2c) if x is not None), None)
    return (
        _cpp.address(call.bias),
        _cpp.address(call.buckets),
        rows(call.c2p),
        rows(call.p2c),
        0 if by_bucket is None else by_bucket.shape[-1],
        *(0 if table is None else table.shape[-1] // 2 for table in (call.bias, call.buckets)),
    )


def forward(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    if call.cu_seqlens is not None:
        check_offsets(call.cu_seqlens, key.shape[0], call.max_seqlen)
    if call.positions_q is not None:
        check_positions(call.positions_q, call.cu_seqlens_q)
    call = _of_unit_stride(call)
    offsets, options = _description(call)
    out = torch.empty(query.shape, dtype=query.dtype)
    lse = torch.empty((*query.shape[:-3], query.shape[-2], query.shape[-3]), dtype=torch.float32)
    _cpp.library.attention_forward(
        _cpp.DTYPE_CODES[query.dtype],
        call.sizes(query, key),
        *map(rows, (query, key, value, out)),
        lse.data_ptr(),
        list(map(_cpp.address, offsets)),
        *options,
    )
    return out, lse


def backward(
    dout: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    gradients: list[Tensor | None],
    call: Call,
) -> None:
    query, key, value, out, lse = tensors
    query, key, value, dout = unit_stride(query), unit_stride(key), unit_stride(value), unit_stride(dout)
    call = _of_unit_stride(call)
    offsets, options = _description(call)
    dquery, dkey, dvalue, dbias, dc2p, dp2c = gradients
    _cpp.library.attention_backward(
        _cpp.DTYPE_CODES[query.dtype],
        call.sizes(query, key),
        *map(rows, (query, key, value, out)),
        lse.data_ptr(),
        rows(dout),
        *map(rows, (dquery, dkey, dvalue)),
        _cpp.address(dbias),
        *map(rows, (dc2p, dp2c)),
        list(map(_cpp.address, offsets)),
        *options,
    )
