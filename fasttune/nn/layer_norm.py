"""LayerNorm, and LayerNorm of dropout(x) + residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasttune import ops
from fasttune.ops._random import check_probability


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm (same arguments, attributes and state_dict) whose forward and backward are one pass each.

    Shapes: input (..., *normalized_shape), output like input, weight and bias of shape normalized_shape.
    Raises ValueError where input does not end in normalized_shape.
    """

    def forward(self, input: Tensor) -> Tensor:
        return normalize(self, input)


class DropoutAddLayerNorm(nn.LayerNorm):
    """y = LayerNorm(dropout(x) + residual): the end of every transformer sublayer, in one pass.

    Arguments and state_dict are nn.LayerNorm's, with `dropout`, the probability of dropping an element of x (active in
    training mode alone), and `prenorm`, which makes the module return (y, dropout(x) + residual) for pre-norm models,
    where the sum goes on as the next residual.

    Shapes: x and residual (..., *normalized_shape), result or results like x.
    Raises ValueError where x does not end in normalized_shape or residual differs from x in shape.
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
        dropout: float = 0.0,
        prenorm: bool = False,
    ) -> None:
        check_probability("DropoutAddLayerNorm", dropout)
        shape = normalized_shape if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, bias, device, dtype)
        self.dropout = dropout
        self.prenorm = prenorm

    # Another signature than its base: it stays an nn.LayerNorm for whoever sorts parameters by module class.
    def forward(self, x: Tensor, residual: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        flat = flattened(self, x)
        results = ops.dropout_add_layer_norm(
            flat,
            residual.reshape(flat.shape) if residual.shape == x.shape else residual,
            *affine(self, flat),
            eps=self.eps,
            dropout_p=self.dropout if self.training else 0.0,
            prenorm=self.prenorm,
        )
        if self.prenorm:
            return results[0].view(x.shape), results[1].view(x.shape)
        return results.view(x.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}, prenorm={self.prenorm}"


def normalize(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """ops.layer_norm with the module's parameters, over as many dimensions as it normalises."""
    flat = flattened(module, x)
    return ops.layer_norm(flat, *affine(module, flat), eps=module.eps).view(x.shape)


def flattened(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """x with the normalised dimensions joined into one."""
    shape = module.normalized_shape
    if tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"{type(module).__name__}: the input has shape {tuple(x.shape)}; expected it to end in"
            f" normalized_shape {shape}."
        )
    return x if len(shape) == 1 else x.flatten(-len(shape))


def affine(module: nn.LayerNorm, flat: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """weight and bias as vectors, None where the module has none."""
    weight, bias = module.weight, module.bias
    if len(module.normalized_shape) == 1:
        return weight, bias
    return (None if weight is None else weight.flatten()), (None if bias is None else bias.flatten())
