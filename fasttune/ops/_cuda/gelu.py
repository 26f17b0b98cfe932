"""csrc/cuda/gelu.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune.ops import _cuda
from fasttune.ops._cpp import DTYPE_CODES, address, dtype_code

NONE, ERF, TANH = 0, 1, 2  # csrc/cuda/api.h


def kind(tanh: bool) -> int:
    return TANH if tanh else ERF


def bias_gelu(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """fasttune::bias_gelu."""
    x, bias = x.contiguous(), _cuda.contiguous(bias)
    out = torch.empty_like(x)
    columns = x.shape[-1]
    _cuda.call(
        "bias_gelu",
        x,
        DTYPE_CODES[x.dtype],
        dtype_code(bias),
        x.data_ptr(),
        address(bias),
        out.data_ptr(),
        x.numel() // max(columns, 1),
        columns,
        kind(tanh),
    )
    return out


def bias_gelu_backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, need_dx: bool, need_dbias: bool
) -> tuple[Tensor, Tensor]:
    """fasttune::bias_gelu_backward: (dx, dbias), empty where not needed."""
    dout, x, bias = dout.contiguous(), x.contiguous(), _cuda.contiguous(bias)
    dx = torch.empty(x.shape if need_dx else (0,), dtype=x.dtype, device=x.device)
    dbias = torch.empty_like(bias) if need_dbias and bias is not None else x.new_empty(0)
    columns = x.shape[-1]
    rows = x.numel() // max(columns, 1)
    partials = _cuda.library.bias_gelu_partials(rows, columns, _cuda.multiprocessors(x.device))
    partial = torch.empty((partials if need_dbias else 0, columns), dtype=torch.float32, device=x.device)
    _cuda.call(
        "bias_gelu_backward",
        x,
        DTYPE_CODES[x.dtype],
        dtype_code(bias),
        dout.data_ptr(),
        x.data_ptr(),
        address(bias),
        dx.data_ptr() if need_dx else 0,
        dbias.data_ptr() if need_dbias else 0,
        partial.data_ptr(),
        partials,
        rows,
        columns,
        kind(tanh),
    )
    return dx, dbias
