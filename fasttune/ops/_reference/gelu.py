"""GELU of x + bias in torch operators."""

from __future__ import annotations

from torch import Tensor

from fasttune.ops._reference.activation import bias_activation


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """GELU(x + bias) for x of shape (..., columns), in x's dtype; a wider bias is added in its own."""
    return bias_activation(x, bias, "gelu_tanh" if approximate == "tanh" else "gelu")
