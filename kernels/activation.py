"""y = act(x + bias), or y = act(x + bias) (gate + gate_bias), over (rows, columns).

Backward, with z = x + bias and m = gate + gate_bias recomputed (nothing but the inputs is saved): dx = dy m act'(z),
dgate = dy act(z), and the gradients of the biases are their sums over rows.
Bytes: forward x, the gate and y once each, backward dy, x, the gate and their gradients once each; the bias once a tile
(1/32 of a row). Rows have strides: the halves of one tensor are read, and their gradients written, where they lie.
Operations: about 15 an element forward, 20 backward with a GELU, fewer with the others; memory is the bound.
Tiling: 32 rows by 128 columns. Rows of 128 elements are whole sectors in every dtype, and the tall tile makes the bias,
read once a tile, cost 2 % of the traffic where a tile of four rows would cost 12 %. Backward, a program keeps one block
of columns and strides over the rows, so that its sums for dbias stay in registers; one small kernel adds the programs'.
With a gate, whose loads and gradient want as many registers again, its tile has half the rows, and with sums for the
biases a quarter: at half, float32 spills.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttune.kernels import launch
from fasttune.kernels.activation_math import activate, gradients
from fasttune.kernels.column_sums import column_sums
from fasttune.kernels.launch import tile_of

ROWS, COLUMNS = 32, 128
GATED_ROWS = 16  # backward, and half of it with sums for dbias


@triton.jit(do_not_specialize=["rows"])
def activation_forward_kernel(
    x,
    gate,
    bias,
    y,
    rows,
    columns,
    x_stride,
    gate_stride,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row_tile, column_tile = tile_of(columns, COLUMNS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None]
    value = tl.load(x + at * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    m = 1.0
    if gate is not None:
        m = tl.load(gate + at * gate_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            m += tl.load(bias + columns + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at * columns + column[None, :], activate(value, m, KIND).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def activation_backward_kernel(
    dy,
    x,
    gate,
    bias,
    dx,
    dgate,
    dbias_partial,
    rows,
    columns,
    x_stride,
    gate_stride,
    gradient_stride,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    valid = column < columns
    if bias is not None:
        b = tl.load(bias + column, mask=valid, other=0.0).to(tl.float32)[None, :]
        if gate is not None:
            gate_b = tl.load(bias + columns + column, mask=valid, other=0.0).to(tl.float32)[None, :]
    if dbias_partial is not None:
        dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
        if gate is not None:
            dgate_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & valid[None, :]
        at = row.to(tl.int64)[:, None]
        value = tl.load(x + at * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + at * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            value += b
        m = 1.0
        if gate is not None:
            m = tl.load(gate + at * gate_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
            if bias is not None:
                m += gate_b
        of_x, of_gate = gradients(value, m, grad, KIND)
        offset = at * gradient_stride + column[None, :]
        if dx is not None:
            tl.store(dx + offset, of_x.to(dx.dtype.element_ty), mask=inside)
        if dgate is not None:
            tl.store(dgate + offset, of_gate.to(dgate.dtype.element_ty), mask=inside)
        if dbias_partial is not None:
            dbias += of_x
            if gate is not None:
                dgate_bias += of_gate
    if dbias_partial is not None:
        if gate is None:
            partial = dbias_partial + tl.program_id(1) * columns + column
            tl.store(partial, tl.sum(dbias, 0), mask=valid)
        else:
            partial = dbias_partial + tl.program_id(1) * (2 * columns) + column
            tl.store(partial, tl.sum(dbias, 0), mask=valid)
            tl.store(partial + columns, tl.sum(dgate_bias, 0), mask=valid)


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
    activation_forward_kernel[(triton.cdiv(columns, COLUMNS) * triton.cdiv(rows, ROWS),)](
        *(x, gate, bias, out, rows, columns, *strides),
        KIND=activation,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=launch.warps(4),
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
    tile, blocks = ROWS, triton.cdiv(columns, COLUMNS)
    if gate is not None:
        tile = GATED_ROWS if dbias is None else GATED_ROWS // 2
    programs = min(triton.cdiv(rows, tile), triton.cdiv(4 * launch.multiprocessors(x.device), blocks))
    partial = None
    if dbias is not None:
        partial = torch.empty((programs, dbias.shape[0]), dtype=torch.float32, device=x.device)
    activation_backward_kernel[(blocks, programs)](
        *(dout, x, gate, bias, dx, dgate, partial, rows, columns, *strides),
        KIND=activation,
        ROWS=tile,
        COLUMNS=COLUMNS,
        STAGES=2,
        num_warps=launch.warps(8),
    )
    if dbias is not None and partial is not None:
        column_sums(partial, dbias.dtype, dbias)
