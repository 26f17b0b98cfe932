"""GELU after a bias or after LayerNorm, and the feed-forward sublayer made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttune import ops
from fasttune.nn.layer_norm import LayerNorm, affine, flattened
from fasttune.ops._random import check_probability


class BiasGELU(nn.Module):
    """GELU(x + bias), the bias being a parameter of this module: put it after nn.Linear(..., bias=False).

    features: size of the last dimension of x. approximate: "none" (erf) or "tanh", as for nn.GELU.
    One pass forward, one backward that also sums the bias gradient; nothing but x is kept for it.

    Shapes: x (..., features), bias (features,), output like x. Raises ValueError for another last dimension.
    """

    def __init__(
        self, features: int, approximate: str = "none", *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.features = features
        self.approximate = _checked("BiasGELU", approximate)
        self.bias = nn.Parameter(torch.zeros(features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return ops.bias_gelu(x, self.bias, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"{self.features}, approximate={self.approximate!r}"


class LayerNormGELU(nn.LayerNorm):
    """GELU(LayerNorm(x)) in one pass; nn.LayerNorm's arguments and state_dict, and `approximate` as for nn.GELU.

    Shapes: x (..., *normalized_shape), output like x. Raises ValueError where x does not end in normalized_shape.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        approximate: str = "none",
    ) -> None:
        shape = normalized_shape if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, bias, device, dtype)
        self.approximate = _checked("LayerNormGELU", approximate)

    def forward(self, x: Tensor) -> Tensor:
        flat = flattened(self, x)
        y = ops.layer_norm_gelu(flat, *affine(self, flat), eps=self.eps, approximate=self.approximate)
        return y.view(x.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, approximate={self.approximate!r}"


class LayerNormMLP(nn.Module):
    """dropout(linear2(GELU(linear1(norm(x))))): a pre-norm feed-forward sublayer, without its residual.

    Parameters are norm.{weight,bias}, linear1.{weight,bias} (hidden_dim, embed_dim) and linear2.{weight,bias}
    (embed_dim, hidden_dim), linear1 and linear2 named and shaped as in nn.TransformerEncoderLayer. `dropout` acts in
    training mode alone, by the shared generator.

    Shapes: x (..., embed_dim), output like x. Raises ValueError for another last dimension.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        dropout: float = 0.0,
        approximate: str = "tanh",
        eps: float = 1e-5,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_probability("LayerNormMLP", dropout)
        super().__init__()
        self.norm = LayerNorm(embed_dim, eps=eps, bias=bias, device=device, dtype=dtype)
        self.linear1 = nn.Linear(embed_dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.linear2 = nn.Linear(hidden_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.dropout = dropout
        self.approximate = _checked("LayerNormMLP", approximate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.linear1.bias is None:
            hidden = F.gelu(self.linear1(x), approximate=self.approximate)
        else:  # the bias is added inside the GELU's pass instead of the product's
            hidden = ops.bias_gelu(F.linear(x, self.linear1.weight), self.linear1.bias, approximate=self.approximate)
        return ops.dropout(self.linear2(hidden), dropout_p=self.dropout if self.training else 0.0)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}, approximate={self.approximate!r}"


def _checked(module: str, approximate: str) -> str:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{module}: approximate is {approximate!r}; expected 'none' or 'tanh'.")
    return approximate
