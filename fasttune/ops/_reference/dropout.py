"""Dropout and dropout + residual by the shared generator, in torch operators."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune.ops._reference.philox import elementwise_keep_mask, keep_scale


def dropout(
    x: Tensor, residual: Tensor | None, row_ids: Tensor | None, seed: Tensor | None, dropout_p: float
) -> Tensor:
    """out = x * mask * scale (+ residual) for x of shape (..., columns)."""
    out = x
    if seed is not None:
        columns = x.shape[-1]
        rows = x.numel() // max(columns, 1)
        ids = row_ids if row_ids is not None else torch.arange(rows, device=x.device)
        kept = elementwise_keep_mask(ids, columns, seed, dropout_p).view(x.shape)
        out = torch.where(kept, x * keep_scale(dropout_p), torch.zeros((), dtype=x.dtype, device=x.device))
    return out if residual is None else out + residual
