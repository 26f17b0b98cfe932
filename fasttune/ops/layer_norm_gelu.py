"""Layer normalisation fused with the GELU behind it or in front of it, in one pass each way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _backends, _cpp, _triton
from fasttune.ops._checks import check_approximate, check_columns, check_number, check_parameter
from fasttune.ops._cuda import layer_norm as _cuda_layer_norm
from fasttune.ops._operator import Operator
from fasttune.ops._reference.layer_norm import gelu_layer_norm as gelu_layer_norm_reference
from fasttune.ops._reference.layer_norm import layer_norm_gelu as layer_norm_gelu_reference
from fasttune.ops.layer_norm import empty_parameter_gradients, empty_statistics

# Shape legend: x, out, dout, dx (..., columns), rows = numel / columns; weight, bias (columns,);
# statistics float32 (2, rows): the mean and 1 / standard deviation of each row of the norm's input.


def _cpp_forward(kernel: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, tanh: bool) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        weight = None if weight is None else weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        out, statistics = torch.empty_like(x), empty_statistics(x)
        getattr(_cpp.library, kernel)(
            _cpp.DTYPE_CODES[x.dtype],
            _cpp.dtype_code(weight),
            _cpp.dtype_code(bias),
            x.data_ptr(),
            _cpp.address(weight),
            _cpp.address(bias),
            out.data_ptr(),
            statistics.data_ptr(),
            statistics.shape[1],
            x.shape[-1],
            eps,
            tanh,
        )
        return out, statistics

    return forward


def _cpp_backward(kernel: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def backward(
        dout: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Tensor,
        tanh: bool,
        need_dx: bool,
        need_dweight: bool,
        need_dbias: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dout, x = dout.contiguous(), x.contiguous()
        weight = None if weight is None else weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        dx, dweight, dbias = _fake_backward(dout, x, weight, bias, statistics, tanh, need_dx, need_dweight, need_dbias)
        getattr(_cpp.library, kernel)(
            _cpp.DTYPE_CODES[x.dtype],
            _cpp.dtype_code(weight),
            _cpp.dtype_code(bias),
            dout.data_ptr(),
            x.data_ptr(),
            _cpp.address(weight),
            _cpp.address(bias),
            statistics.data_ptr(),
            dx.data_ptr() if need_dx else 0,
            dweight.data_ptr() if need_dweight else 0,
            dbias.data_ptr() if need_dbias else 0,
            statistics.shape[1],
            x.shape[-1],
            tanh,
        )
        return dx, dweight, dbias

    return backward


def _fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, tanh: bool) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), empty_statistics(x)


def _fake_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    tanh: bool,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty(x.shape if need_dx else (0,), dtype=x.dtype, device=x.device)
    return dx, *empty_parameter_gradients(x, weight, bias, need_dweight, need_dbias)


def _setup_context(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, ctx.tanh, ctx.backend = args
    ctx.save_for_backward(x, weight, bias, outputs[1])


def _operators(name: str) -> Operator:
    """The operator `name`, differentiable, and `name`_backward behind it."""
    gradients = Operator(
        f"{name}_backward",
        "(Tensor dout, Tensor x, Tensor? weight, Tensor? bias, Tensor statistics, bool tanh, bool need_dx,"
        " bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)",
        {
            "cpp": _cpp_backward(f"{name}_backward"),
            "triton": _triton.lazy("layer_norm", f"{name}_backward"),
            "cuda": getattr(_cuda_layer_norm, f"{name}_backward"),
        },
        _fake_backward,
        public=3,
    )

    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:3]
        dx, dweight, dbias = gradients(
            dout, x, weight, bias, statistics, ctx.tanh, need_dx, need_dweight, need_dbias, ctx.backend
        )
        return dx if need_dx else None, dweight if need_dweight else None, dbias if need_dbias else None, None, None

    return Operator(
        name,
        "(Tensor x, Tensor? weight, Tensor? bias, float eps, bool tanh) -> (Tensor, Tensor)",
        {
            "cpp": _cpp_forward(name),
            "triton": _triton.lazy("layer_norm", name),
            "cuda": getattr(_cuda_layer_norm, name),
        },
        _fake,
        setup_context=_setup_context,
        backward=backward,
    )


_layer_norm_gelu = _operators("layer_norm_gelu")
_gelu_layer_norm = _operators("gelu_layer_norm")
_backends.declare("layer_norm_gelu", *_layer_norm_gelu.implementations)
_backends.declare("gelu_layer_norm", *_gelu_layer_norm.implementations)


def layer_norm_gelu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    approximate: str = "none",
    backend: str | None = None,
) -> Tensor:
    """GELU(LN(x)), LN over the last dimension.

    x: (..., columns), any strides, float32, bfloat16 or float16 (float64 on the torch backend).
    weight, bias: (columns,), in x's dtype or float32, or None for ones and zeros.
    eps: added to the variance, in squared units of x.
    approximate: "none" for GELU by erf, "tanh" for the form that Transformers calls "gelu_new".
    backend: "cpp", "triton", "cuda", "torch" or None to choose.

    Returns a tensor like x, computed in float32 and rounded once. Sources: Ba, Kiros and Hinton 2016; Hendrycks and
    Gimpel 2016.

    Raises TypeError and ValueError for arguments that do not fit together, before any memory is touched, and
    RuntimeError for a backend that cannot run here.
    """
    tanh = _check("layer_norm_gelu", x, weight, bias, eps, approximate)
    chosen = _backends.choose("layer_norm_gelu", x, backend)
    if chosen == "torch":
        return layer_norm_gelu_reference(x, weight, bias, eps, approximate)
    return _layer_norm_gelu(x, weight, bias, eps, tanh, chosen)


def gelu_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    approximate: str = "none",
    backend: str | None = None,
) -> Tensor:
    """LN(GELU(x)), LN over the last dimension: the transform in BERT's masked-language-model head.

    Arguments, result and errors are `layer_norm_gelu`'s.
    """
    tanh = _check("gelu_layer_norm", x, weight, bias, eps, approximate)
    chosen = _backends.choose("gelu_layer_norm", x, backend)
    if chosen == "torch":
        return gelu_layer_norm_reference(x, weight, bias, eps, approximate)
    return _gelu_layer_norm(x, weight, bias, eps, tanh, chosen)


def _check(operation: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, approximate: str) -> bool:
    check_columns(operation, x)
    check_number(operation, "eps", eps)
    check_parameter(operation, "weight", weight, x.shape[-1], x)
    check_parameter(operation, "bias", bias, x.shape[-1], x)
    return check_approximate(operation, approximate)
