"""csrc/cuda/activation.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune.ops import _cuda
from fasttune.ops._cpp import DTYPE_CODES, address, dtype_code


def forward(
    x: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    rows: int,
    columns: int,
    strides: tuple[int, int],
    activation: int,
) -> None:
    """out = act(x + bias), or with a gate act(x + its bias) (gate + its bias). strides: of the rows of x and gate."""
    _cuda.call(
        "activation",
        x,
        DTYPE_CODES[x.dtype],
        dtype_code(bias),
        activation,
        x.data_ptr(),
        address(gate),
        address(bias),
        out.data_ptr(),
        rows,
        columns,
        *strides,
    )


def backward(
    dout: Tensor,
    x: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    dx: Tensor | None,
    dgate: Tensor | None,
    dbias: Tensor | None,
    rows: int,
    columns: int,
    strides: tuple[int, int, int],
    activation: int,
) -> None:
    """Fills the gradients that are not None. strides: of the rows of x, of the gate, and of dx and dgate."""
    partials = _cuda.library.activation_partials(rows, columns, _cuda.multiprocessors(x.device))
    biases = 0 if dbias is None else dbias.shape[0]
    partial = torch.empty((partials, biases), dtype=torch.float32, device=x.device)
    _cuda.call(
        "activation_backward",
        x,
        DTYPE_CODES[x.dtype],
        dtype_code(bias),
        activation,
        dout.data_ptr(),
        x.data_ptr(),
        address(gate),
        address(bias),
        address(dx),
        address(dgate),
        address(dbias),
        partial.data_ptr(),
        partials,
        rows,
        columns,
        *strides,
    )
