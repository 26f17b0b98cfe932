"""csrc/cuda/dropout.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune.ops import _cuda
from fasttune.ops._cpp import DTYPE_CODES, address


def dropout(
    x: Tensor, residual: Tensor | None, row_ids: Tensor | None, seed: Tensor | None, dropout_p: float
) -> Tensor:
    """fasttune::dropout."""
    x, residual = x.contiguous(), _cuda.contiguous(residual)
    out = torch.empty_like(x)
    columns = x.shape[-1]
    _cuda.call(
        "dropout",
        x,
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        address(residual),
        out.data_ptr(),
        x.numel() // max(columns, 1),
        columns,
        address(row_ids),
        address(seed),
        dropout_p,
    )
    return out
