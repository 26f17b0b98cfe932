"""out = dropout(x) + residual, elementwise over (rows, columns).

Backward: dx = dropout(dout) with the same seed and row ids (the mask is regenerated, never stored) and
dresidual = dout, so this one kernel serves both directions.
Bytes: x, residual and out once each. Operations: about 16 an element, most of them the generator's integer ones; at
bfloat16 an H100 has some 17 integer operations for each element it can read and write, so memory stays the bound.
Tiling: a program takes 4096 elements as [rows, columns] with at most 1024 columns; columns are a multiple of 128, the
generator's block. Rows beyond 2**31 elements are reached by 64-bit offsets.
"""

import torch
import triton
import triton.language as tl

from fasttune.kernels import launch
from fasttune.kernels.launch import dropout_arguments, power_of_two, tile_of
from fasttune.kernels.philox import dropped_elements

TILE = 4096


@triton.jit(do_not_specialize=["rows", "threshold"])
def dropout_kernel(
    x,
    residual,
    out,
    row_ids,
    seed,
    rows,
    columns,
    threshold,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row_tile, column_tile = tile_of(columns, COLUMNS)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    first_column = column_tile * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    if seed is not None:
        ids = row.to(tl.int64)
        if row_ids is not None:
            ids = tl.load(row_ids + row, mask=row < rows, other=0)
        dropped = dropped_elements(tl.load(seed), ids, first_column, threshold, COLUMNS)
        value = tl.where(dropped, 0.0, value * scale)
    if residual is not None:
        value += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=inside)


def dropout(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    row_ids: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = torch.empty_like(x)
    if not x.numel():
        return out
    columns = x.shape[-1]
    rows = x.numel() // columns
    threshold, scale = dropout_arguments(seed, dropout_p)
    block_columns = min(1024, power_of_two(columns, 128))
    block_rows = TILE // block_columns
    grid = (triton.cdiv(rows, block_rows) * triton.cdiv(columns, block_columns),)
    dropout_kernel[grid](
        *(x, residual, out, row_ids, seed, rows, columns, threshold, scale),
        ROWS=block_rows,
        COLUMNS=block_columns,
        num_warps=launch.warps(4),
    )
    return out
