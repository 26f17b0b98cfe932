"""Of every head of the first `rotated` parts of x, with h = W / 2 and a row of cos and sin for each row of x:
    out[d]     = x[d] cos[d]         - x[d + h] sin[d]
    out[d + h] = x[d + h] cos[d + h] + x[d] sin[d + h]      for d < h
and out = x in the columns from W on and in the other parts. Computed in float32, rounded once.

Backward: the map is linear and dx is its transpose applied to dout,
    dx[d]     = dout[d] cos[d]         + dout[d + h] sin[d + h]
    dx[d + h] = dout[d + h] cos[d + h] - dout[d] sin[d],
the forward map with (-sin[d + h], -sin[d]) for (sin[d], sin[d + h]): one kernel serves both, and backward needs neither
x nor the output.
Bytes: x and out once each; a row of the tables, and 8 for its number, once for all heads. Operations: 4 for a turned
element, so memory is the bound.
Tiling: a program takes 1024 pairs of columns as [rows, heads, pairs], with at most 8 heads, and walks the heads of its
rows with their tables in registers: short rows share a program, long ones have loads in flight. A head's columns are
one tile, since they are a few hundred at most; D and W are constants, so that loads are as wide as they allow.
An id out of range reads nothing: NaN where the row would be turned.
"""

import torch
import triton
import triton.language as tl

from fasttune.kernels import launch
from fasttune.kernels.launch import power_of_two

PAIRS = 1024
HEADS = 8


@triton.jit
def _table(table, place, known, column, HALF: tl.constexpr):
    """float32 [rows, 1, columns] of a half of the table's rows; NaN in rows that are not known."""
    value = tl.load(table + place + column, mask=known & (column < HALF), other=0.0).to(tl.float32)
    return tl.where(known, value, float("nan"))


@triton.jit(do_not_specialize=["rows", "sequence", "table_rows", "heads", "all_heads", "turned_heads"])
def rotary_kernel(
    x,
    out,
    cos,
    sin,
    row_ids,
    rows,
    sequence,
    table_rows,
    heads,
    all_heads,
    turned_heads,
    batch_stride,
    row_stride,
    part_stride,
    head_stride,
    D: tl.constexpr,
    W: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST: tl.constexpr,
):
    HALF: tl.constexpr = W // 2
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    column = tl.arange(0, COLUMNS)[None, None, :]
    exists = row < rows
    id = tl.load(row_ids + row, mask=exists, other=0) if row_ids is not None else row % table_rows
    known = (id >= 0) & (id < table_rows)
    place = id * W
    cos_low = _table(cos, place, known, column, HALF)
    cos_high = _table(cos, place + HALF, known, column, HALF)
    sin_low = _table(sin, place, known, column, HALF)
    sin_high = _table(sin, place + HALF, known, column, HALF)
    if INVERSE:
        sin_low, sin_high = -sin_high, -sin_low
    x += row // sequence * batch_stride + row % sequence * row_stride
    out += row * all_heads * D
    for first in range(0, all_heads, HEADS):
        head = first + tl.arange(0, HEADS)[None, :, None]  # of all parts, one after another
        here = exists & (head < all_heads)
        source = x + (head // heads).to(tl.int64) * part_stride + (head % heads).to(tl.int64) * head_stride
        target = out + head * D
        inside = here & (column < HALF)
        low = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(source + HALF + column, mask=inside, other=0.0).to(tl.float32)
        turned = head < turned_heads
        new_low = tl.where(turned, low * cos_low - high * sin_low, low)
        new_high = tl.where(turned, high * cos_high + low * sin_high, high)
        tl.store(target + column, new_low.to(out.dtype.element_ty), mask=inside)
        tl.store(target + HALF + column, new_high.to(out.dtype.element_ty), mask=inside)
        if REST > 0:
            behind = W + tl.arange(0, REST)[None, None, :]
            copied = here & (behind < D)
            tl.store(target + behind, tl.load(source + behind, mask=copied), mask=copied)


def rotary(
    x: torch.Tensor,
    out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    row_ids: torch.Tensor | None,
    rotated: int,
    inverse: bool,
) -> None:
    """Writes out, contiguous, from x (B, S, N, H, D)."""
    batch, sequence, parts, heads, head_dim = x.shape
    table_rows, width = cos.shape
    rows = batch * sequence
    columns = power_of_two(width // 2)
    block_heads = min(HEADS, power_of_two(parts * heads))
    block_rows = max(1, PAIRS // (block_heads * columns))
    rotary_kernel[(triton.cdiv(rows, block_rows),)](
        *(x, out, cos, sin, row_ids, rows, sequence, table_rows, heads, parts * heads, rotated * heads),
        *x.stride()[:4],
        D=head_dim,
        W=width,
        INVERSE=inverse,
        ROWS=block_rows,
        HEADS=block_heads,
        COLUMNS=columns,
        REST=power_of_two(head_dim - width) if width < head_dim else 0,
        num_warps=launch.warps(4),
    )
