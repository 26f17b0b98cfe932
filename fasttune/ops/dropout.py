"""Dropout by the shared counter-based generator (docs/dropout.md), with an optional residual added in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _backends, _cpp, _triton
from fasttune.ops._checks import check_device, check_floating, check_row_ids, check_shape
from fasttune.ops._cuda import dropout as _cuda_dropout
from fasttune.ops._operator import Operator
from fasttune.ops._random import check_probability, draw_seed
from fasttune.ops._reference.dropout import dropout as dropout_reference

# Shape legend: x, residual, out (..., columns), rows = numel / columns; row_ids (rows,); seed (1,).


def _cpp_dropout(
    x: Tensor, residual: Tensor | None, row_ids: Tensor | None, seed: Tensor | None, dropout_p: float
) -> Tensor:
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = torch.empty_like(x)
    columns = x.shape[-1]
    rows = x.numel() // max(columns, 1)
    _cpp.library.dropout(
        _cpp.DTYPE_CODES[x.dtype],
        x.data_ptr(),
        _cpp.address(residual),
        out.data_ptr(),
        rows,
        columns,
        _cpp.address(row_ids),
        _cpp.address(seed),
        dropout_p,
    )
    return out


def _fake(x: Tensor, residual: Tensor | None, row_ids: Tensor | None, seed: Tensor | None, dropout_p: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
    _, residual, row_ids, seed, dropout_p, backend = args
    ctx.save_for_backward(row_ids, seed)
    ctx.has_residual, ctx.dropout_p, ctx.backend = residual is not None, dropout_p, backend


def _backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    row_ids, seed = ctx.saved_tensors
    dx = _dropout(dout, None, row_ids, seed, ctx.dropout_p, ctx.backend) if ctx.needs_input_grad[0] else None
    return dx, (dout if ctx.has_residual else None), None, None, None


_dropout = Operator(
    "dropout",
    "(Tensor x, Tensor? residual, Tensor? row_ids, Tensor? seed, float dropout_p) -> Tensor",
    {"cpp": _cpp_dropout, "triton": _triton.lazy("dropout", "dropout"), "cuda": _cuda_dropout.dropout},
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
_backends.declare("dropout", *_dropout.implementations)


def dropout(
    x: Tensor,
    *,
    dropout_p: float = 0.5,
    residual: Tensor | None = None,
    row_ids: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x * mask / (1 - p) (+ residual), the mask drawn by fasttune's shared generator.

    x: (..., columns) or a single number, any strides, float32, bfloat16 or float16 (float64 on the torch backend).
    dropout_p: probability of dropping, honoured to 2⁻¹⁶; 0 is the identity.
    residual: x's shape, dtype and device; added after the dropout.
    row_ids: int64 (rows,), the logical number of each row, rows = x.numel() / columns; a row keeps its mask wherever it
        stands in x. None means 0, 1, 2, ...
    backend: "cpp", "triton", "cuda", "torch" or None to choose.

    Returns a tensor like x. Source: Salmon et al. 2011 (Philox 4x32-10); Srivastava et al. 2014.

    Raises TypeError and ValueError for arguments that do not fit together, before any memory is touched, and
    RuntimeError for a backend that cannot run here.
    """
    check_floating("dropout", "x", x)
    check_probability("dropout", dropout_p)
    if residual is not None:
        check_shape("dropout", "residual", residual, x.shape, "like x")
        check_device("dropout", "residual", residual, x.device, "x")
        if residual.dtype != x.dtype:
            x, residual = _promote(x, residual)
    if x.dim() == 0:
        lone = None if residual is None else residual.view(1)
        return dropout(x.view(1), dropout_p=dropout_p, residual=lone, row_ids=row_ids, backend=backend).view(())
    row_ids = check_row_ids("dropout", row_ids, x)
    if dropout_p == 0.0:
        return x if residual is None else x + residual
    chosen = _backends.choose("dropout", x, backend)
    seed = draw_seed(x.device)
    if chosen == "torch":
        return dropout_reference(x, residual, row_ids, seed, dropout_p)
    return _dropout(x, residual, row_ids, seed, dropout_p, chosen)


def _promote(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)
