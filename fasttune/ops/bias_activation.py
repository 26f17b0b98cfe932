"""act(x + bias), the activation between the two linear layers of a transformer's MLP, in one pass each way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _backends
from fasttune.ops._activations import (
    ACTIVATIONS,
    LAUNCHERS,
    check_activation,
    empty_bias_gradient,
    run_backward,
    run_forward,
)
from fasttune.ops._checks import check_approximate, check_columns, check_parameter
from fasttune.ops._operator import Operator
from fasttune.ops._reference.activation import bias_activation as bias_activation_reference
from fasttune.ops._reference.gelu import bias_gelu as bias_gelu_reference

# Shape legend: x, dout, dx (..., columns); bias, dbias (columns,).


def _operators(name: str, option: str, number: Callable[[Any], int]) -> Operator:
    """The operator `name`, differentiable, and `name`_backward behind it. number: of the activation, by the option."""

    def forward(backend: str, x: Tensor, bias: Tensor | None, activation: Any) -> Tensor:
        out = _fake(x, bias, activation)
        run_forward(backend, x, None, bias, out, number(activation))
        return out

    def gradients(
        backend: str, dout: Tensor, x: Tensor, bias: Tensor | None, activation: Any, need_dx: bool, need_dbias: bool
    ) -> tuple[Tensor, Tensor]:
        dx, dbias = _fake_backward(dout, x, bias, activation, need_dx, need_dbias)
        wanted = (dx if need_dx else None, None, dbias if need_dbias else None)
        run_backward(backend, dout, x, None, bias, *wanted, x.shape[-1], number(activation))
        return dx, dbias

    of_backward = Operator(
        f"{name}_backward",
        f"(Tensor dout, Tensor x, Tensor? bias, {option}, bool need_dx, bool need_dbias) -> (Tensor, Tensor)",
        {backend: partial(gradients, backend) for backend in LAUNCHERS},
        _fake_backward,
        public=2,
    )

    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        x, bias = ctx.saved_tensors
        need_dx, need_dbias = ctx.needs_input_grad[:2]
        dx, dbias = of_backward(dout, x, bias, ctx.activation, need_dx, need_dbias, ctx.backend)
        return dx if need_dx else None, dbias if need_dbias else None, None

    return Operator(
        name,
        f"(Tensor x, Tensor? bias, {option}) -> Tensor",
        {backend: partial(forward, backend) for backend in LAUNCHERS},
        _fake,
        setup_context=_setup_context,
        backward=backward,
    )


def _fake(x: Tensor, bias: Tensor | None, activation: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, activation: Any, need_dx: bool, need_dbias: bool
) -> tuple[Tensor, Tensor]:
    """Empty gradients; one that is not needed has no elements."""
    dx = torch.empty(x.shape if need_dx else (0,), dtype=x.dtype, device=x.device)
    return dx, empty_bias_gradient(x, bias, need_dbias)


def _setup_context(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.activation, ctx.backend = args
    ctx.save_for_backward(x, bias)


_bias_activation = _operators("bias_activation", "int activation", int)
_bias_gelu = _operators("bias_gelu", "bool tanh", lambda tanh: ACTIVATIONS["gelu_tanh" if tanh else "gelu"])
_backends.declare("bias_activation", *_bias_activation.implementations)
_backends.declare("bias_gelu", *_bias_gelu.implementations)


def bias_activation(x: Tensor, bias: Tensor | None, *, activation: str = "gelu", backend: str | None = None) -> Tensor:
    """act(x + bias).

    x: (..., columns), any strides, float32, bfloat16 or float16 (float64 on the torch backend).
    bias: (columns,), in x's dtype or float32, or None.
    activation: "gelu" (by erf), "gelu_tanh", "silu" (x σ(x)), "relu", "quick_gelu" (x σ(1.702 x)) or "relu2"
        (max(x, 0)²), as Transformers names them but for gelu_tanh, its "gelu_new".
    backend: "cpp", "triton", "cuda", "torch" or None to choose.

    Returns a tensor like x, computed in float32 and rounded once. Nothing but x and bias is kept for backward, which
    computes the bias gradient in the same pass. Sources: Hendrycks and Gimpel 2016 (GELU, SiLU and σ(1.702 x)); So et
    al. 2021 (ReLU²).

    Raises TypeError and ValueError for arguments that do not fit together, before any memory is touched, and
    RuntimeError for a backend that cannot run here.
    """
    check_columns("bias_activation", x)
    check_parameter("bias_activation", "bias", bias, x.shape[-1], x)
    number = check_activation("bias_activation", activation)
    chosen = _backends.choose("bias_activation", x, backend)
    if chosen == "torch":
        return bias_activation_reference(x, bias, activation)
    return _bias_activation(x, bias, number, chosen)


def bias_gelu(x: Tensor, bias: Tensor | None, *, approximate: str = "none", backend: str | None = None) -> Tensor:
    """GELU(x + bias), GELU(x) = x Φ(x): `bias_activation` by torch's name of the two forms.

    x: (..., columns), any strides, float32, bfloat16 or float16 (float64 on the torch backend).
    bias: (columns,), in x's dtype or float32, or None.
    approximate: "none" for Φ by erf, "tanh" for (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2, Transformers' "gelu_new".
    backend: "cpp", "triton", "cuda", "torch" or None to choose.

    Returns a tensor like x, computed in float32 and rounded once. Nothing but x and bias is kept for backward, which
    computes the bias gradient in the same pass. Source: Hendrycks and Gimpel 2016.

    Raises TypeError and ValueError for arguments that do not fit together, before any memory is touched, and
    RuntimeError for a backend that cannot run here.
    """
    check_columns("bias_gelu", x)
    check_parameter("bias_gelu", "bias", bias, x.shape[-1], x)
    tanh = check_approximate("bias_gelu", approximate)
    chosen = _backends.choose("bias_gelu", x, backend)
    if chosen == "torch":
        return bias_gelu_reference(x, bias, approximate)
    return _bias_gelu(x, bias, tanh, chosen)
