"""GELU of x + bias in torch operators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """GELU(x + bias) for x of shape (..., columns), in x's dtype; a wider bias is added in its own."""
    return F.gelu(x if bias is None else x + bias, approximate=approximate).to(x.dtype)
