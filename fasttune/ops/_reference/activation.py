"""act(x + bias), alone and times a gate, in torch operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttune.ops._activations import halves

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: torch.square(F.relu(x)),
}


def bias_activation(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """act(x + bias) for x of shape (..., columns), in x's dtype; a wider bias is added in its own."""
    return FUNCTIONS[activation](x if bias is None else x + bias).to(x.dtype)


def gated_activation(a: Tensor, b: Tensor | None, bias: Tensor | None, activation: str) -> Tensor:
    """act(activated + its bias) * (gate + its bias), in a's dtype; a wider bias is added in its own."""
    x, gate = halves(a, b)
    if bias is not None:
        x, gate = x + bias[: x.shape[-1]], gate + bias[x.shape[-1] :]
    return (FUNCTIONS[activation](x) * gate).to(a.dtype)
