"""Layer normalisation, and what is fused with it, in torch operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttune.ops._reference.dropout import dropout


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LN over the last dimension, in x's dtype; wider parameters are applied in their own."""
    dtype = x.dtype
    for parameter in (weight, bias):
        if parameter is not None:
            dtype = torch.promote_types(dtype, parameter.dtype)
    weight, bias = (None if parameter is None else parameter.to(dtype) for parameter in (weight, bias))
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row_ids: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(LN(sum), sum) with sum = dropout(x) + residual."""
    total = dropout(x, residual, row_ids, seed, dropout_p)
    return layer_norm(total, weight, bias, eps), total


def layer_norm_gelu(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, approximate: str) -> Tensor:
    return F.gelu(layer_norm(x, weight, bias, eps), approximate=approximate)


def gelu_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, approximate: str) -> Tensor:
    return layer_norm(F.gelu(x, approximate=approximate), weight, bias, eps)
