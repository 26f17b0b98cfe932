"""Layer normalisation, alone and with the dropout and the residual addition before it, in one pass each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _backends, _cpp, _triton
from fasttune.ops._checks import (
    check_columns,
    check_device,
    check_floating,
    check_number,
    check_parameter,
    check_row_ids,
    check_shape,
)
from fasttune.ops._cuda import layer_norm as _cuda_layer_norm
from fasttune.ops._operator import Operator
from fasttune.ops._random import check_probability, draw_seed
from fasttune.ops._reference.layer_norm import dropout_add_layer_norm as dropout_add_layer_norm_reference
from fasttune.ops._reference.layer_norm import layer_norm as layer_norm_reference
from fasttune.ops.dropout import _dropout

# Shape legend: x, residual, sum, out and their gradients (..., columns), rows = numel / columns; weight, bias
# (columns,); statistics float32 (2, rows): the mean and 1 / standard deviation of each row; row_ids (rows,); seed (1,).


def _cpp_dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    row_ids: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    keep_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out, total, statistics = _fake(x, residual, weight, bias, row_ids, seed, dropout_p, eps, keep_sum)
    kept = total if keep_sum else None
    _run_cpp_forward(x, residual, weight, bias, out, kept, statistics, eps, row_ids, seed, dropout_p)
    return out, total, statistics


def _cpp_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    out, statistics = torch.empty_like(x), empty_statistics(x)
    _run_cpp_forward(x, None, weight, bias, out, None, statistics, eps)
    return out, statistics


def _run_cpp_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    total: Tensor | None,
    statistics: Tensor,
    eps: float,
    row_ids: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> None:
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    _cpp.library.layer_norm(
        _cpp.DTYPE_CODES[out.dtype],
        _cpp.DTYPE_CODES[x.dtype],
        _cpp.dtype_code(weight),
        _cpp.dtype_code(bias),
        x.data_ptr(),
        _cpp.address(residual),
        _cpp.address(weight),
        _cpp.address(bias),
        out.data_ptr(),
        _cpp.address(total),
        statistics.data_ptr(),
        statistics.shape[1],
        x.shape[-1],
        eps,
        _cpp.address(row_ids),
        _cpp.address(seed),
        dropout_p,
    )


def _cpp_backward(
    dout: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    row_ids: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
    need_dx: bool,
    need_dresidual: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dout, total = dout.contiguous(), total.contiguous()
    dsum = None if dsum is None else dsum.contiguous()
    weight = None if weight is None else weight.contiguous()
    dx = torch.empty(total.shape if need_dx else (0,), dtype=x_dtype, device=total.device)
    dresidual = torch.empty(total.shape if need_dresidual else (0,), dtype=total.dtype, device=total.device)
    dweight, dbias = empty_parameter_gradients(total, weight, bias, need_dweight, need_dbias)
    _cpp.library.layer_norm_backward(
        _cpp.DTYPE_CODES[total.dtype],
        _cpp.DTYPE_CODES[x_dtype],
        _cpp.dtype_code(weight),
        _cpp.dtype_code(bias),
        dout.data_ptr(),
        _cpp.address(dsum),
        total.data_ptr(),
        _cpp.address(weight),
        statistics.data_ptr(),
        dx.data_ptr() if need_dx else 0,
        dresidual.data_ptr() if need_dresidual else 0,
        dweight.data_ptr() if need_dweight else 0,
        dbias.data_ptr() if need_dbias else 0,
        statistics.shape[1],
        total.shape[-1],
        _cpp.address(row_ids),
        _cpp.address(seed),
        dropout_p,
    )
    return dx, dresidual, dweight, dbias


def empty_parameter_gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, need_dweight: bool, need_dbias: bool
) -> tuple[Tensor, Tensor]:
    """Empty gradients of the parameters; one that is not needed has no elements."""
    dweight = torch.empty_like(weight) if need_dweight and weight is not None else x.new_empty(0)
    dbias = torch.empty_like(bias) if need_dbias and bias is not None else x.new_empty(0)
    return dweight, dbias


def empty_statistics(x: Tensor) -> Tensor:
    return torch.empty((2, x.numel() // max(x.shape[-1], 1)), dtype=torch.float32, device=x.device)


def _fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    row_ids: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    keep_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.dtype if residual is None else residual.dtype
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = torch.empty(x.shape if keep_sum else (0,), dtype=dtype, device=x.device)
    return out, total, empty_statistics(x)


def _fake_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), empty_statistics(x)


def _fake_backward(
    dout: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    row_ids: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
    need_dx: bool,
    need_dresidual: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty(total.shape if need_dx else (0,), dtype=x_dtype, device=total.device)
    dresidual = torch.empty(total.shape if need_dresidual else (0,), dtype=total.dtype, device=total.device)
    return dx, dresidual, *empty_parameter_gradients(total, weight, bias, need_dweight, need_dbias)


def _setup_context(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, _, weight, bias, row_ids, seed, ctx.dropout_p, _, _, ctx.backend = args
    _, total, statistics = outputs
    ctx.x_dtype = x.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, weight, bias, statistics, row_ids, seed)


def _backward(ctx: Any, dout: Tensor | None, dsum: Tensor | None) -> tuple[Any, ...]:
    total, weight, bias, statistics, row_ids, seed = ctx.saved_tensors
    need_dx, need_dresidual, need_dweight, need_dbias = ctx.needs_input_grad[:4]
    dx = dresidual = dweight = dbias = None
    if dout is None and dsum is not None:  # the normalised output was not used: the sum alone has a gradient
        dresidual = dsum
        if need_dx:
            dx = dsum if seed is None else _dropout(dsum, None, row_ids, seed, ctx.dropout_p, ctx.backend)
            dx = dx.to(ctx.x_dtype)
    elif dout is not None:
        same = seed is None and ctx.x_dtype == total.dtype  # dx and dresidual: one tensor, written once
        dx, dresidual, dweight, dbias = _layer_norm_backward(
            dout,
            dsum,
            total,
            weight,
            bias,
            statistics,
            row_ids,
            seed,
            ctx.dropout_p,
            ctx.x_dtype,
            need_dx and not same,
            need_dresidual or (need_dx and same),
            need_dweight,
            need_dbias,
            ctx.backend,
        )
        dx = dresidual if same else dx
    return (
        dx if need_dx else None,
        dresidual if need_dresidual else None,
        dweight if need_dweight else None,
        dbias if need_dbias else None,
        *(None,) * 5,
    )


def _setup_layer_norm_context(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, ctx.backend = args
    ctx.save_for_backward(x, weight, bias, outputs[1])


def _layer_norm_gradients(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    x, weight, bias, statistics = ctx.saved_tensors
    need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:3]
    _, dx, dweight, dbias = _layer_norm_backward(
        dout,
        None,
        x,
        weight,
        bias,
        statistics,
        None,
        None,
        0.0,
        x.dtype,
        False,
        need_dx,
        need_dweight,
        need_dbias,
        ctx.backend,
    )
    return dx if need_dx else None, dweight if need_dweight else None, dbias if need_dbias else None, None


_layer_norm_backward = Operator(
    "layer_norm_backward",
    "(Tensor dout, Tensor? dsum, Tensor total, Tensor? weight, Tensor? bias, Tensor statistics, Tensor? row_ids,"
    " Tensor? seed, float dropout_p, ScalarType x_dtype, bool need_dx, bool need_dresidual, bool need_dweight,"
    " bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor)",
    {
        "cpp": _cpp_backward,
        "triton": _triton.lazy("layer_norm", "layer_norm_backward"),
        "cuda": _cuda_layer_norm.layer_norm_backward,
    },
    _fake_backward,
    public=4,
)
_layer_norm = Operator(
    "layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    {
        "cpp": _cpp_layer_norm,
        "triton": _triton.lazy("layer_norm", "layer_norm"),
        "cuda": _cuda_layer_norm.layer_norm,
    },
    _fake_layer_norm,
    setup_context=_setup_layer_norm_context,
    backward=_layer_norm_gradients,
)
_dropout_add_layer_norm = Operator(
    "dropout_add_layer_norm",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? row_ids, Tensor? seed, float dropout_p,"
    " float eps, bool keep_sum) -> (Tensor, Tensor, Tensor)",
    {
        "cpp": _cpp_dropout_add_layer_norm,
        "triton": _triton.lazy("layer_norm", "dropout_add_layer_norm"),
        "cuda": _cuda_layer_norm.dropout_add_layer_norm,
    },
    _fake,
    setup_context=_setup_context,
    backward=_backward,
    public=2,
)
_backends.declare("layer_norm", *_layer_norm.implementations)
_backends.declare("dropout_add_layer_norm", *_dropout_add_layer_norm.implementations)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float = 1e-5, backend: str | None = None
) -> Tensor:
    """(x - mean) / √(variance + eps) * weight + bias over the last dimension.

    x: (..., columns), any strides, float32, bfloat16 or float16 (float64 on the torch backend).
    weight, bias: (columns,), in x's dtype or float32, or None for ones and zeros.
    eps: added to the variance, in squared units of x.
    backend: "cpp", "triton", "cuda", "torch" or None to choose.

    Returns a tensor like x, computed in float32 and rounded once. Source: Ba, Kiros and Hinton 2016.

    Raises TypeError and ValueError for arguments that do not fit together, before any memory is touched, and
    RuntimeError for a backend that cannot run here.
    """
    check_columns("layer_norm", x)
    check_parameter("layer_norm", "weight", weight, x.shape[-1], x)
    check_parameter("layer_norm", "bias", bias, x.shape[-1], x)
    check_number("layer_norm", "eps", eps)
    chosen = _backends.choose("layer_norm", x, backend)
    if chosen == "torch":
        return layer_norm_reference(x, weight, bias, eps)
    return _layer_norm(x, weight, bias, eps, chosen)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    prenorm: bool = False,
    row_ids: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """LN(sum) with sum = dropout(x) + residual: one end of a transformer sublayer and the norm that follows.

    x: (..., columns), any strides, float32, bfloat16 or float16 (float64 on the torch backend).
    residual: x's shape and device. Where the dtypes differ, sum and result have the wider one, as dropout(x) + residual
        would; a 16-bit x beside a float32 residual is what a linear layer under autocast leaves.
    weight, bias: (columns,), in the sum's dtype or float32, or None for ones and zeros.
    eps: added to the variance, in squared units of x.
    dropout_p: probability of dropping, honoured to 2⁻¹⁶; the mask is `ops.dropout`'s and is not stored.
    prenorm: False for post-norm layers (BERT): returns LN(sum). True for pre-norm layers (GPT-2): returns
        (LN(sum), sum); the sum goes on as the residual stream and may have a gradient of its own.
    row_ids: int64 (rows,), the logical number of each row for the dropout, rows = x.numel() / columns; None means
        0, 1, 2, ...
    backend: "cpp", "triton", "cuda", "torch" or None to choose.

    Returns one or two tensors of x's shape, computed in float32; the sum is rounded before it is normalised, so that
    the first result is exactly the norm of the second. Sources: Ba, Kiros and Hinton 2016; docs/dropout.md.

    Raises TypeError and ValueError for arguments that do not fit together, before any memory is touched, and
    RuntimeError for a backend that cannot run here.
    """
    check_columns("dropout_add_layer_norm", x)
    check_floating("dropout_add_layer_norm", "residual", residual)
    check_shape("dropout_add_layer_norm", "residual", residual, x.shape, "like x")
    check_device("dropout_add_layer_norm", "residual", residual, x.device, "x")
    check_probability("dropout_add_layer_norm", dropout_p)
    row_ids = check_row_ids("dropout_add_layer_norm", row_ids, x)
    if residual.dtype != x.dtype:
        x, residual = _promote(x, residual)
    check_parameter("dropout_add_layer_norm", "weight", weight, x.shape[-1], residual)
    check_parameter("dropout_add_layer_norm", "bias", bias, x.shape[-1], residual)
    check_number("dropout_add_layer_norm", "eps", eps)
    chosen = _backends.choose("dropout_add_layer_norm", residual, backend)
    seed = draw_seed(x.device) if dropout_p > 0.0 else None
    if chosen == "torch":
        out, total = dropout_add_layer_norm_reference(x, residual, weight, bias, row_ids, seed, dropout_p, eps)
    else:
        keep_sum = prenorm or torch.is_grad_enabled()  # backward reads it
        out, total = _dropout_add_layer_norm(x, residual, weight, bias, row_ids, seed, dropout_p, eps, keep_sum, chosen)
    return (out, total) if prenorm else out


def _promote(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The residual in the dtype of dropout(x) + residual. A 16-bit x beside float32 stays: kernels read it as it is."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return (x if dtype == torch.float32 else x.to(dtype)), residual.to(dtype)
