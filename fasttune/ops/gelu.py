"""GELU(x + bias), the activation between the two linear layers of a transformer's MLP, in one pass each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _backends, _cpp, _triton
from fasttune.ops._checks import check_approximate, check_columns, check_parameter
from fasttune.ops._cuda import gelu as _cuda_gelu
from fasttune.ops._operator import Operator
from fasttune.ops._reference.gelu import bias_gelu as bias_gelu_reference

# Shape legend: x, dout, dx (..., columns), rows = numel / columns; bias, dbias (columns,).


def _cpp_bias_gelu(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = torch.empty_like(x)
    columns = x.shape[-1]
    _cpp.library.bias_gelu(
        _cpp.DTYPE_CODES[x.dtype],
        _cpp.dtype_code(bias),
        x.data_ptr(),
        _cpp.address(bias),
        out.data_ptr(),
        x.numel() // max(columns, 1),
        columns,
        tanh,
    )
    return out


def _cpp_bias_gelu_backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, need_dx: bool, need_dbias: bool
) -> tuple[Tensor, Tensor]:
    dout, x = dout.contiguous(), x.contiguous()
    bias = None if bias is None else bias.contiguous()
    dx, dbias = _fake_backward(dout, x, bias, tanh, need_dx, need_dbias)
    columns = x.shape[-1]
    _cpp.library.bias_gelu_backward(
        _cpp.DTYPE_CODES[x.dtype],
        _cpp.dtype_code(bias),
        dout.data_ptr(),
        x.data_ptr(),
        _cpp.address(bias),
        dx.data_ptr() if need_dx else 0,
        dbias.data_ptr() if need_dbias else 0,
        x.numel() // max(columns, 1),
        columns,
        tanh,
    )
    return dx, dbias


def _fake(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, need_dx: bool, need_dbias: bool
) -> tuple[Tensor, Tensor]:
    """Empty gradients; one that is not needed has no elements."""
    dx = torch.empty(x.shape if need_dx else (0,), dtype=x.dtype, device=x.device)
    if need_dbias:
        assert bias is not None
        return dx, torch.empty(bias.shape, dtype=bias.dtype, device=x.device)
    return dx, torch.empty((0,), dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.tanh, ctx.backend = args
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    x, bias = ctx.saved_tensors
    need_dx, need_dbias = ctx.needs_input_grad[:2]
    dx, dbias = _bias_gelu_backward(dout, x, bias, ctx.tanh, need_dx, need_dbias, ctx.backend)
    return dx if need_dx else None, dbias if need_dbias else None, None


_bias_gelu_backward = Operator(
    "bias_gelu_backward",
    "(Tensor dout, Tensor x, Tensor? bias, bool tanh, bool need_dx, bool need_dbias) -> (Tensor, Tensor)",
    {
        "cpp": _cpp_bias_gelu_backward,
        "triton": _triton.lazy("gelu", "bias_gelu_backward"),
        "cuda": _cuda_gelu.bias_gelu_backward,
    },
    _fake_backward,
    public=2,
)
_bias_gelu = Operator(
    "bias_gelu",
    "(Tensor x, Tensor? bias, bool tanh) -> Tensor",
    {"cpp": _cpp_bias_gelu, "triton": _triton.lazy("gelu", "bias_gelu"), "cuda": _cuda_gelu.bias_gelu},
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
_backends.declare("bias_gelu", *_bias_gelu.implementations)


def bias_gelu(x: Tensor, bias: Tensor | None, *, approximate: str = "none", backend: str | None = None) -> Tensor:
    """GELU(x + bias), GELU(x) = x Φ(x).

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
