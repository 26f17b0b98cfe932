"""out[r] = source[index[r]], or zeros where index[r] < 0, over rows of any dtype: pack, unpack and their gradients.

Unpacking (a scatter to distinct rows, zeros elsewhere) is the same gather by the inverse index, which inverse_kernel
writes first: 8 bytes a row of scratch instead of clearing the result and then writing most of it again. Each is the
other's backward, and every output row has one writer.

Bytes: each gathered row once in and every output row once out; index 8 a row (24 with its inverse). No arithmetic.
Tiling: 4096 elements as [rows, columns] with at most 1024 columns; 64-bit row offsets.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttune.kernels import launch
from fasttune.kernels.launch import power_of_two, tile_of

TILE = 4096


@triton.jit(do_not_specialize=["rows", "source_rows"])
def gather_rows_kernel(source, index, out, rows, source_rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row_tile, column_tile = tile_of(columns, COLUMNS)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    source_row = tl.load(index + row, mask=row < rows, other=-1)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    known = inside & ((source_row >= 0) & (source_row < source_rows))[:, None]
    value = tl.load(source + source_row[:, None] * columns + column[None, :], mask=known, other=0)
    tl.store(out + row.to(tl.int64)[:, None] * columns + column[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["size", "count"])
def inverse_kernel(index, inverse, size, count, BLOCK: tl.constexpr):
    """inverse[index[i]] = i for distinct indices in [0, count); others are passed over."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + at, mask=at < size, other=-1)
    tl.store(inverse + row, at.to(tl.int64), mask=(row >= 0) & (row < count))


def _gather(source: Tensor, index: Tensor, rows: int) -> Tensor:
    source = source.contiguous()
    out = torch.empty((rows, *source.shape[1:]), dtype=source.dtype, device=source.device)
    if not out.numel():
        return out
    if not source.numel():
        return out.zero_()
    columns = out.numel() // rows
    block_columns = min(1024, power_of_two(columns, 128))
    block_rows = TILE // block_columns
    gather_rows_kernel[(triton.cdiv(rows, block_rows) * triton.cdiv(columns, block_columns),)](
        *(source, index, out, rows, source.shape[0], columns),
        ROWS=block_rows,
        COLUMNS=block_columns,
        num_warps=launch.warps(4),
    )
    return out


def gather_rows(rows: Tensor, indices: Tensor, count: int) -> Tensor:
    """fasttune::gather_rows: rows[indices], (R, ...) and int64 (T,) to (T, ...)."""
    return _gather(rows, indices.contiguous(), indices.shape[0])


def scatter_rows(packed: Tensor, indices: Tensor, count: int) -> Tensor:
    """fasttune::scatter_rows: (T, ...) to (count, ...), row i at the distinct indices[i], zeros elsewhere."""
    indices = indices.contiguous()
    inverse = torch.full((count,), -1, dtype=torch.int64, device=packed.device)
    if indices.numel():
        inverse_kernel[(triton.cdiv(indices.numel(), 1024),)](
            indices, inverse, indices.numel(), count, BLOCK=1024, num_warps=launch.warps(4)
        )
    return _gather(packed, inverse, count)
