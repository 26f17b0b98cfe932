"""out[r] = word[word_ids[r]] + token_type[type_ids[r]] + position[position_ids[r]] in one pass, summed in float32.

Backward: each table's gradient row v is Σ of dout[r] over the rows r that looked v up. Atomics would add in any order,
so the ids are sorted (stably: rows stay in their order) and equal ids form runs. A run may hold two rows or all of
them (token types, padding), so a program takes RUN consecutive places of the sorted order, whatever runs they are of:
    runs that lie inside the piece are written at once;
    the end of a run that began in an earlier piece goes to `heads`, the beginning of one that goes on to `tails`.
A second kernel, for each piece whose last run goes on, adds its tail and the heads of the pieces that follow. Every
gradient row has one writer, the order of additions depends on the ids alone, and nothing is read back to the host.

Bytes: forward, each table's rows and the sum once, 8 a row and table of ids. Backward, dout once, each gradient once
cleared and its rows written, and for each piece at most two float32 rows written and read; the sort is torch's. One
addition an element: memory is the bound.
Tiling: forward 4096 elements; backward pieces of RUN rows by up to 1024 columns, a row at a time in registers.
An id out of range reads nothing: NaN in the sum, and no gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttune.kernels import launch
from fasttune.kernels.launch import power_of_two

TILE = 4096
RUN = 32


@triton.jit
def _look_up(ids, table, size, row, rows, column, columns):
    """float32 tile of the table's rows; NaN for an id out of range."""
    id = tl.load(ids + row, mask=row < rows, other=0)
    known = (id >= 0) & (id < size)
    mask = (known & (row < rows))[:, None] & (column < columns)[None, :]
    value = tl.load(table + id[:, None] * columns + column[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.where(known[:, None], value, float("nan"))


@triton.jit(do_not_specialize=["rows"])
def embedding_sum_kernel(
    word_ids,
    word,
    type_ids,
    token_type,
    position_ids,
    position,
    out,
    rows,
    words,
    types,
    positions,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    value = _look_up(word_ids, word, words, row, rows, column, columns)
    if token_type is not None:
        value += _look_up(type_ids, token_type, types, row, rows, column, columns)
    if position is not None:
        value += _look_up(position_ids, position, positions, row, rows, column, columns)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * columns + column[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "size", "skip"])
def run_sums_kernel(
    dout, order, ids, gradient, heads, tails, rows, size, skip, columns, RUN: tl.constexpr, COLUMNS: tl.constexpr
):
    piece = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = column < columns
    first, last = piece * RUN, tl.minimum(piece * RUN + RUN, rows)
    total = tl.zeros([COLUMNS], tl.float32)
    earlier = False  # whether the current run began in an earlier piece
    if first > 0:
        earlier = tl.load(ids + first - 1) == tl.load(ids + first)
    for place in range(first, last):
        id = tl.load(ids + place)
        source = tl.load(order + place)
        total += tl.load(dout + source * columns + column, mask=valid, other=0.0).to(tl.float32)
        ends = tl.load(ids + tl.minimum(place + 1, rows - 1)) != id or place + 1 == rows
        if ends or place + 1 == last:
            if earlier:
                tl.store(heads + piece.to(tl.int64) * columns + column, total, mask=valid)
            elif ends:
                wanted = (id >= 0) & (id < size) & (id != skip)
                inside = column < tl.where(wanted, columns, 0)
                tl.store(gradient + id * columns + column, total.to(gradient.dtype.element_ty), mask=inside)
            else:
                tl.store(tails + piece.to(tl.int64) * columns + column, total, mask=valid)
            total = tl.zeros([COLUMNS], tl.float32)
            earlier = False


@triton.jit(do_not_specialize=["rows", "size", "skip"])
def long_runs_kernel(ids, heads, tails, gradient, rows, size, skip, columns, RUN: tl.constexpr, COLUMNS: tl.constexpr):
    """For each piece in which a run begins that goes on: its tail and the heads of the pieces up to the run's end."""
    piece = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = column < columns
    last = piece * RUN + RUN - 1  # the last place of this piece
    if last + 1 < rows:
        id = tl.load(ids + last)
        begins = True
        if piece > 0:
            begins = tl.load(ids + piece * RUN - 1) != id
        wanted = (id >= 0) & (id < size) & (id != skip)
        if begins and tl.load(ids + last + 1) == id and wanted:
            total = tl.load(tails + piece.to(tl.int64) * columns + column, mask=valid, other=0.0)
            next = piece + 1
            on = True
            while on:
                total += tl.load(heads + next.to(tl.int64) * columns + column, mask=valid, other=0.0)
                after = (next + 1) * RUN  # the run goes on if it holds the first place of the piece after
                on = after < rows
                if on:
                    on = tl.load(ids + after) == id
                next += 1
            tl.store(gradient + id * columns + column, total.to(gradient.dtype.element_ty), mask=valid)


def embedding_sum(
    word_ids: Tensor,
    word: Tensor,
    type_ids: Tensor | None,
    token_type: Tensor | None,
    position_ids: Tensor | None,
    position: Tensor | None,
    padding_idx: int | None,
    sparse: bool,
) -> Tensor:
    """fasttune::embedding_sum: (..., C)."""
    ids = [None if i is None else i.contiguous() for i in (word_ids, type_ids, position_ids)]
    tables = [None if t is None else t.contiguous() for t in (word, token_type, position)]
    columns = word.shape[1]
    out = torch.empty((*word_ids.shape, columns), dtype=word.dtype, device=word.device)
    if out.numel():
        rows = word_ids.numel()
        block_columns = min(1024, power_of_two(columns, 128))
        block_rows = TILE // block_columns
        embedding_sum_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(columns, block_columns))](
            *(x for pair in zip(ids, tables, strict=True) for x in pair),
            *(out, rows, *(0 if t is None else t.shape[0] for t in tables), columns),
            ROWS=block_rows,
            COLUMNS=block_columns,
            num_warps=launch.warps(8),
        )
    return out


def _add_runs(dout: Tensor, ids: Tensor, order: Tensor, gradient: Tensor, skip: int) -> None:
    """gradient[v] = Σ dout[order[i]] over the i with ids[i] = v; ids ascending; `skip` gets nothing."""
    rows, columns = ids.numel(), dout.shape[-1]
    if not rows or not columns:
        return
    pieces = triton.cdiv(rows, RUN)
    block = min(1024, power_of_two(columns, 128))
    heads, tails = torch.empty((2, pieces, columns), dtype=torch.float32, device=dout.device)
    grid = (pieces, triton.cdiv(columns, block))
    options = {"RUN": RUN, "COLUMNS": block, "num_warps": launch.warps(max(1, block // 256))}
    sizes = (rows, gradient.shape[0], skip, columns)
    run_sums_kernel[grid](dout, order, ids, gradient, heads, tails, *sizes, **options)
    long_runs_kernel[grid](ids, heads, tails, gradient, *sizes, **options)


def embedding_gradient(dout: Tensor, ids: Tensor, size: int, padding_idx: int | None) -> Tensor:
    """fasttune::embedding_gradient: (size, C) from dout (..., C) and ids (...)."""
    gradient = torch.zeros((size, dout.shape[-1]), dtype=dout.dtype, device=dout.device)
    ordered, order = ids.reshape(-1).sort(stable=True)
    _add_runs(dout.contiguous(), ordered, order, gradient, -1 if padding_idx is None else padding_idx)
    return gradient


def embedding_sparse_gradient(dout: Tensor, ids: Tensor, size: int, padding_idx: int | None) -> Tensor:
    """The same as a coalesced sparse tensor (size, C). The number of its rows has to reach the host."""
    ordered, order = ids.reshape(-1).sort(stable=True)
    if padding_idx is not None:
        counts = ordered != padding_idx
        ordered, order = ordered[counts], order[counts]
    distinct, place = ordered.unique_consecutive(return_inverse=True)
    values = torch.zeros((distinct.numel(), dout.shape[-1]), dtype=dout.dtype, device=dout.device)
    _add_runs(dout.contiguous(), place, order, values, -1)
    with torch.sparse.check_sparse_tensor_invariants(False):
        return torch.sparse_coo_tensor(distinct[None], values, (size, dout.shape[-1]), is_coalesced=True)
