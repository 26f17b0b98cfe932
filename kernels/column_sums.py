"""Second stage of every parameter gradient: sums over the rows of float32 partial sums, (rows, columns) to (columns,).

The first stage leaves one row of partial sums for each program of a persistent grid, so there is nothing to add with
atomics, and the order of additions depends on the device's number of multiprocessors alone.
"""

import torch
import triton
import triton.language as tl

from fasttune.kernels import launch

COLUMNS = 32
ROWS = 64


@triton.jit(do_not_specialize=["rows"])
def column_sums_kernel(partial, out, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(partial + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < columns)


def column_sums(partial: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """float32 (rows, columns) to (columns,) of `dtype`, into `out` where it is given."""
    rows, columns = partial.shape
    if out is None:
        out = torch.empty(columns, dtype=dtype, device=partial.device)
    column_sums_kernel[(triton.cdiv(columns, COLUMNS),)](
        partial, out, rows, columns, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=launch.warps(4)
    )
    return out
