"""The activations by name, and what the operations on them share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fasttune.ops import _activation_cpp, _triton
from fasttune.ops._cuda import activation as _activation_cuda

# The numbers that every kernel takes: csrc/cpu/activation.h, csrc/cuda/api.h, kernels/activation_math.py.
ACTIVATIONS = {"gelu": 1, "gelu_tanh": 2, "silu": 3, "relu": 4, "quick_gelu": 5, "relu2": 6}

# backend -> forward and backward, as `run_forward` and `run_backward` call them.
LAUNCHERS: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "cpp": (_activation_cpp.forward, _activation_cpp.backward),
    "triton": (_triton.lazy("activation", "forward"), _triton.lazy("activation", "backward")),
    "cuda": (_activation_cuda.forward, _activation_cuda.backward),
}


def run_forward(
    backend: str, x: Tensor, gate: Tensor | None, bias: Tensor | None, out: Tensor, activation: int
) -> None:
    """out = act(x + bias), or with a gate act(x + its bias) (gate + its bias)."""
    elements = out.numel()
    if not elements:
        return
    columns = out.shape[-1]
    x, x_stride = _strided_rows(x, columns)
    gate, gate_stride = (None, 0) if gate is None else _strided_rows(gate, columns)
    bias = None if bias is None else bias.contiguous()
    LAUNCHERS[backend][0](x, gate, bias, out, elements // columns, columns, (x_stride, gate_stride), activation)


def run_backward(
    backend: str,
    dout: Tensor,
    x: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    dx: Tensor | None,
    dgate: Tensor | None,
    dbias: Tensor | None,
    gradient_stride: int,
    activation: int,
) -> None:
    """Fills the gradients that are not None; rows of dx and dgate begin `gradient_stride` elements apart."""
    elements = dout.numel()
    if not elements:
        if dbias is not None:
            dbias.zero_()
        return
    columns = dout.shape[-1]
    x, x_stride = _strided_rows(x, columns)
    gate, gate_stride = (None, 0) if gate is None else _strided_rows(gate, columns)
    bias = None if bias is None else bias.contiguous()
    sizes, strides = (elements // columns, columns), (x_stride, gate_stride, gradient_stride)
    LAUNCHERS[backend][1](dout.contiguous(), x, gate, bias, dx, dgate, dbias, *sizes, strides, activation)


def _strided_rows(x: Tensor, columns: int) -> tuple[Tensor, int]:
    """x (..., columns) with rows evenly spaced and each in one piece, and how many elements apart they begin: x, a view
    of it, or a copy where no view is like that."""
    if x.is_contiguous():
        return x, columns
    rows = x.reshape(-1, columns)
    if columns > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def check_activation(operation: str, activation: str) -> int:
    """The number of an activation."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"{operation}: activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[activation]


def halves(a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """(activated, gate): the halves of a's last dimension, or a and b."""
    if b is not None:
        return a, b
    activated, gate = a.chunk(2, -1)
    return activated, gate


def empty_bias_gradient(x: Tensor, bias: Tensor | None, need_dbias: bool) -> Tensor:
    """Without elements where it is not needed."""
    if not need_dbias or bias is None:
        return torch.empty((0,), dtype=x.dtype, device=x.device)
    return torch.empty(bias.shape, dtype=bias.dtype, device=x.device)
