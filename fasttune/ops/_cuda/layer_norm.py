"""csrc/cuda/layer_norm.cu and csrc/cuda/layer_norm_gelu.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune.ops import _cuda
from fasttune.ops._cpp import DTYPE_CODES, address, dtype_code

NONE, ERF, TANH = 0, 1, 2  # csrc/cuda/api.h


def kind(tanh: bool) -> int:
    return TANH if tanh else ERF


# Shape legend: as in fasttune/ops/layer_norm.py.


def _check_width(x: Tensor, gelu: int) -> None:
    widest = _cuda.library.max_norm_columns if gelu == NONE else _cuda.library.max_norm_gelu_columns
    if x.shape[-1] > widest:
        raise ValueError(
            f"layer_norm: x has {x.shape[-1]} columns; the cuda backend takes at most {widest}. Leave backend at None"
            " or ask for 'torch'."
        )


def _forward(
    kernel: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    row_ids: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    keep_sum: bool,
    gelu: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, sum or an empty tensor, statistics)."""
    _check_width(x, gelu)
    x, residual = x.contiguous(), _cuda.contiguous(residual)
    weight, bias = _cuda.contiguous(weight), _cuda.contiguous(bias)
    dtype, columns = x.dtype if residual is None else residual.dtype, x.shape[-1]
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = torch.empty(x.shape if keep_sum else (0,), dtype=dtype, device=x.device)
    statistics = torch.empty((2, x.numel() // max(columns, 1)), dtype=torch.float32, device=x.device)
    _cuda.call(
        kernel,
        x,
        DTYPE_CODES[dtype],
        DTYPE_CODES[x.dtype],
        dtype_code(weight),
        dtype_code(bias),
        x.data_ptr(),
        address(residual),
        address(weight),
        address(bias),
        out.data_ptr(),
        total.data_ptr() if keep_sum else 0,
        statistics.data_ptr(),
        statistics.shape[1],
        columns,
        eps,
        address(row_ids),
        address(seed),
        dropout_p,
        gelu,
    )
    return out, total, statistics


def _backward(
    kernel: str,
    dout: Tensor,
    dsum: Tensor | None,
    source: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    row_ids: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
    needs: tuple[bool, bool, bool, bool],
    gelu: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight and bias, empty where not needed. source: the sum, or x where there is none."""
    dout, source, dsum = dout.contiguous(), source.contiguous(), _cuda.contiguous(dsum)
    weight, bias = _cuda.contiguous(weight), _cuda.contiguous(bias)
    rows, columns, device = statistics.shape[1], source.shape[-1], source.device
    dx = torch.empty(source.shape if needs[0] else (0,), dtype=x_dtype, device=device)
    dresidual = torch.empty(source.shape if needs[1] else (0,), dtype=source.dtype, device=device)
    parameters: list[Tensor] = []
    partial: list[Tensor] = []
    partials = _cuda.library.layer_norm_partials(rows, columns, _cuda.multiprocessors(device))
    for like, need in ((weight, needs[2]), (bias, needs[3])):
        wanted = need and like is not None
        parameters.append(torch.empty_like(like) if wanted and like is not None else source.new_empty(0))
        partial.append(torch.empty((partials if wanted else 0, columns), dtype=torch.float32, device=device))
    _cuda.call(
        kernel,
        source,
        DTYPE_CODES[source.dtype],
        DTYPE_CODES[x_dtype],
        dtype_code(weight),
        dtype_code(bias),
        dout.data_ptr(),
        address(dsum),
        source.data_ptr(),
        address(weight),
        address(bias),
        statistics.data_ptr(),
        dx.data_ptr() if needs[0] else 0,
        dresidual.data_ptr() if needs[1] else 0,
        parameters[0].data_ptr() if needs[2] and weight is not None else 0,
        parameters[1].data_ptr() if needs[3] and bias is not None else 0,
        partial[0].data_ptr(),
        partial[1].data_ptr(),
        partials,
        rows,
        columns,
        address(row_ids),
        address(seed),
        dropout_p,
        gelu,
    )
    return dx, dresidual, parameters[0], parameters[1]


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """fasttune::layer_norm."""
    out, _, statistics = _forward("layer_norm", x, None, weight, bias, None, None, 0.0, eps, False, NONE)
    return out, statistics


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row_ids: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    keep_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """fasttune::dropout_add_layer_norm."""
    return _forward("layer_norm", x, residual, weight, bias, row_ids, seed, dropout_p, eps, keep_sum, NONE)


def layer_norm_backward(
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
    """fasttune::layer_norm_backward, of layer_norm and dropout_add_layer_norm."""
    needs = (need_dx, need_dresidual, need_dweight, need_dbias)
    options = (statistics, row_ids, seed, dropout_p, x_dtype, needs, NONE)
    return _backward("layer_norm_backward", dout, dsum, total, weight, bias, *options)


def layer_norm_gelu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, tanh: bool
) -> tuple[Tensor, Tensor]:
    """fasttune::layer_norm_gelu."""
    out, _, statistics = _forward("layer_norm_gelu", x, None, weight, bias, None, None, 0.0, eps, False, kind(tanh))
    return out, statistics


def gelu_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, tanh: bool
) -> tuple[Tensor, Tensor]:
    """fasttune::gelu_layer_norm."""
    out, _, statistics = _forward("gelu_layer_norm", x, None, weight, bias, None, None, 0.0, eps, False, kind(tanh))
    return out, statistics


def layer_norm_gelu_backward(
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
    """fasttune::layer_norm_gelu_backward."""
    options = (statistics, None, None, 0.0, x.dtype, (need_dx, False, need_dweight, need_dbias), kind(tanh))
    dx, _, dweight, dbias = _backward("layer_norm_gelu_backward", dout, None, x, weight, bias, *options)
    return dx, dweight, dbias


def gelu_layer_norm_backward(
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
    """fasttune::gelu_layer_norm_backward."""
    options = (statistics, None, None, 0.0, x.dtype, (need_dx, False, need_dweight, need_dbias), kind(tanh))
    dx, _, dweight, dbias = _backward("gelu_layer_norm_backward", dout, None, x, weight, bias, *options)
    return dx, dweight, dbias
