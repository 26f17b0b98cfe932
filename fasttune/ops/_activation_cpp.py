"""csrc/cpu/activation.cpp."""

from __future__ import annotations

from torch import Tensor

from fasttune.ops import _cpp


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
    _cpp.library.activation(
        _cpp.DTYPE_CODES[x.dtype],
        _cpp.dtype_code(bias),
        activation,
        x.data_ptr(),
        _cpp.address(gate),
        _cpp.address(bias),
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
    _cpp.library.activation_backward(
        _cpp.DTYPE_CODES[x.dtype],
        _cpp.dtype_code(bias),
        activation,
        dout.data_ptr(),
        x.data_ptr(),
        _cpp.address(gate),
        _cpp.address(bias),
        _cpp.address(dx),
        _cpp.address(dgate),
        _cpp.address(dbias),
        rows,
        columns,
        *strides,
    )
