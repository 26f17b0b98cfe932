"""The LayerNorm family, one pass each way over (rows, columns):

    s = dropout(x) + residual | gelu(x) | x,   h = w (s - mean) rstd + b,   y = h | gelu(h).

Backward, with n = (s - mean) rstd and dh = dy gelu'(h) or dy, and g = w dh:
    ds = rstd (g - mean(g) - n mean(g n)) + dtotal,   dw = Σ_rows dh n,   db = Σ_rows dh,
    dx = ds | ds gelu'(x) | dropout(ds) by the same seed and row ids,   dresidual = ds.
(Ba et al. 2016, differentiated.) Saved for it: s, or x where s is a function of x alone, and mean and rstd in float32.

Bytes: forward x, residual, s and y once each, backward dy, s, dx and dresidual once each; 8 bytes a row of statistics;
weight, bias and the partial sums once a program. About 10 operations an element forward and 20 backward (16 and 26 with
dropout): memory is the bound everywhere.
Tiling: the whole row stays in registers, and passes over registers give the mean, its repair by the mean of the
deviations (Chan, Golub and LeVeque 1983) and the variance. At C <= 1024 one row is too little work for a program and
parameter gradients by atomics or by a row of partial sums for each row cost more than the row itself; so a program
takes a tile of several rows, the grid is persistent (a few programs a multiprocessor, each looping over tiles), dw and
db stay in registers until the end, and one small kernel adds the programs' sums. The loop is software-pipelined: the
next tile loads while this one is reduced.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttune.kernels import launch
from fasttune.kernels.column_sums import column_sums
from fasttune.kernels.gelu_math import gelu, gelu_derivative, kind
from fasttune.kernels.launch import dropout_arguments, power_of_two
from fasttune.kernels.philox import dropped_elements

NONE = 0  # no GELU


@triton.jit(do_not_specialize=["rows", "threshold"])
def layer_norm_forward_kernel(
    x,
    residual,
    total,
    y,
    weight,
    bias,
    statistics,
    row_ids,
    seed,
    rows,
    columns,
    eps,
    threshold,
    scale,
    GELU_BEFORE: tl.constexpr,
    GELU_AFTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    valid = (column < columns)[None, :]
    if weight is not None:
        w = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        b = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & valid
        offset = row.to(tl.int64)[:, None] * columns + column[None, :]
        s = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        if seed is not None:
            ids = row.to(tl.int64)
            if row_ids is not None:
                ids = tl.load(row_ids + row, mask=row < rows, other=0)
            s = tl.where(dropped_elements(tl.load(seed), ids, 0, threshold, COLUMNS), 0.0, s * scale)
        if residual is not None:
            s += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
        if residual is not None:
            s = s.to(y.dtype.element_ty).to(tl.float32)  # y is the norm of the sum as it is stored
        if total is not None:
            tl.store(total + offset, s.to(total.dtype.element_ty), mask=inside)
        if GELU_BEFORE:
            s = gelu(s, GELU_BEFORE)
        m = tl.sum(s, 1) / columns
        centred = tl.where(valid, s - m[:, None], 0.0)
        repair = tl.sum(centred, 1) / columns  # of the mean's rounding, which rows far from 0 would show as variance
        m += repair
        centred = tl.where(valid, centred - repair[:, None], 0.0)
        r = tl.rsqrt(tl.sum(centred * centred, 1) / columns + eps)
        h = centred * r[:, None]
        if weight is not None:
            h *= w
        if bias is not None:
            h += b
        if GELU_AFTER:
            h = gelu(h, GELU_AFTER)
        tl.store(y + offset, h.to(y.dtype.element_ty), mask=inside)
        tl.store(statistics + row, m, mask=row < rows)
        tl.store(statistics + rows + row, r, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "threshold"])
def layer_norm_backward_kernel(
    dy,
    dtotal,
    source,
    statistics,
    weight,
    bias,
    dx,
    dresidual,
    dweight_partial,
    dbias_partial,
    row_ids,
    seed,
    rows,
    columns,
    threshold,
    scale,
    GELU_BEFORE: tl.constexpr,
    GELU_AFTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    valid = (column < columns)[None, :]
    if weight is not None:
        w = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if GELU_AFTER and bias is not None:
        b = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if dweight_partial is not None:
        dw = tl.zeros([ROWS, COLUMNS], tl.float32)
    if dbias_partial is not None:
        db = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & valid
        offset = row.to(tl.int64)[:, None] * columns + column[None, :]
        s = tl.load(source + offset, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + offset, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(statistics + row, mask=row < rows, other=0.0)[:, None]
        r = tl.load(statistics + rows + row, mask=row < rows, other=0.0)[:, None]
        normed = gelu(s, GELU_BEFORE) if GELU_BEFORE else s
        n = tl.where(valid, (normed - m) * r, 0.0)
        if GELU_AFTER:
            h = n
            if weight is not None:
                h *= w
            if bias is not None:
                h += b
            g *= gelu_derivative(h, GELU_AFTER)
        if dweight_partial is not None:
            dw += g * n
        if dbias_partial is not None:
            db += g
        if dx is not None or dresidual is not None:
            if weight is not None:
                g *= w
            mean_g = (tl.sum(g, 1) / columns)[:, None]
            mean_gn = (tl.sum(g * n, 1) / columns)[:, None]
            ds = r * (g - mean_g - n * mean_gn)
            if dtotal is not None:
                ds += tl.load(dtotal + offset, mask=inside, other=0.0).to(tl.float32)
            if dresidual is not None:
                tl.store(dresidual + offset, ds.to(dresidual.dtype.element_ty), mask=inside)
            if dx is not None:
                if seed is not None:
                    ids = row.to(tl.int64)
                    if row_ids is not None:
                        ids = tl.load(row_ids + row, mask=row < rows, other=0)
                    ds = tl.where(dropped_elements(tl.load(seed), ids, 0, threshold, COLUMNS), 0.0, ds * scale)
                if GELU_BEFORE:
                    ds *= gelu_derivative(s, GELU_BEFORE)
                tl.store(dx + offset, ds.to(dx.dtype.element_ty), mask=inside)
    first = tl.program_id(0) * columns
    if dweight_partial is not None:
        tl.store(dweight_partial + first + column, tl.sum(dw, 0), mask=column < columns)
    if dbias_partial is not None:
        tl.store(dbias_partial + first + column, tl.sum(db, 0), mask=column < columns)


def _tiles(
    rows: int, columns: int, device: torch.device, elements: int, tile: int = 4096
) -> tuple[tuple[int], dict[str, int]]:
    """Grid and tile: several rows up to `tile` elements, then one row; `elements` of it live in each thread."""
    block = power_of_two(columns, 128)
    block_rows = max(1, tile // block)
    warps = launch.warps(min(16, block * block_rows // elements // 32))
    programs = min(triton.cdiv(rows, block_rows), 2 * launch.multiprocessors(device))
    return (programs,), {"ROWS": block_rows, "COLUMNS": block, "STAGES": 2, "num_warps": warps}


def _rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    row_ids: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    keep_sum: bool,
    gelu_before: int,
    gelu_after: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, sum or an empty tensor, statistics float32 (2, rows): mean and 1 / standard deviation)."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    rows, columns = _rows(x), x.shape[-1]
    dtype = x.dtype if residual is None else residual.dtype
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = torch.empty(x.shape if keep_sum else (0,), dtype=dtype, device=x.device)
    statistics = torch.empty((2, rows), dtype=torch.float32, device=x.device)
    if x.numel():
        threshold, scale = dropout_arguments(seed, dropout_p)
        grid, tiles = _tiles(rows, columns, x.device, 16)
        layer_norm_forward_kernel[grid](
            *(x, residual, total if keep_sum else None, out, _contiguous(weight), _contiguous(bias), statistics),
            *(row_ids, seed, rows, columns, eps, threshold, scale),
            GELU_BEFORE=gelu_before,
            GELU_AFTER=gelu_after,
            **tiles,
        )
    return out, total, statistics


def _backward(
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
    gelu_before: int,
    gelu_after: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight and bias, empty where not needed. source: the sum, or x where there is none."""
    dout, source = dout.contiguous(), source.contiguous()
    rows, columns, device = _rows(source), source.shape[-1], source.device
    dx = torch.empty(source.shape if needs[0] else (0,), dtype=x_dtype, device=device)
    dresidual = torch.empty(source.shape if needs[1] else (0,), dtype=source.dtype, device=device)
    if not source.numel():
        dweight, dbias = (
            torch.zeros_like(p) if need else torch.empty(0, device=device)
            for p, need in ((weight, needs[2]), (bias, needs[3]))
        )
        return dx, dresidual, dweight, dbias
    threshold, scale = dropout_arguments(seed, dropout_p)
    # With a GELU between, 16 elements a thread take more registers than two blocks a multiprocessor leave.
    grid, tiles = _tiles(rows, columns, device, *((8, 2048) if gelu_before or gelu_after else (16, 4096)))
    partial = [torch.empty((grid[0], columns), dtype=torch.float32, device=device) if n else None for n in needs[2:]]
    layer_norm_backward_kernel[grid](
        *(dout, _contiguous(dsum), source, statistics, _contiguous(weight), _contiguous(bias)),
        *(dx if needs[0] else None, dresidual if needs[1] else None, *partial),
        *(row_ids, seed, rows, columns, threshold, scale),
        GELU_BEFORE=gelu_before,
        GELU_AFTER=gelu_after,
        **tiles,
    )
    dweight, dbias = (
        torch.empty(0, device=device) if sums is None else column_sums(sums, like.dtype)
        for sums, like in zip(partial, (weight, bias), strict=True)
    )
    return dx, dresidual, dweight, dbias


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """fasttune::layer_norm."""
    out, _, statistics = _forward(x, None, weight, bias, None, None, 0.0, eps, False, NONE, NONE)
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
    return _forward(x, residual, weight, bias, row_ids, seed, dropout_p, eps, keep_sum, NONE, NONE)


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
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fasttune::layer_norm_backward, of layer_norm and dropout_add_layer_norm."""
    options = (statistics, row_ids, seed, dropout_p, x_dtype, needs, NONE, NONE)
    return _backward(dout, dsum, total, weight, bias, *options)


def layer_norm_gelu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, tanh: bool
) -> tuple[Tensor, Tensor]:
    """fasttune::layer_norm_gelu."""
    out, _, statistics = _forward(x, None, weight, bias, None, None, 0.0, eps, False, NONE, kind(tanh))
    return out, statistics


def gelu_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, tanh: bool
) -> tuple[Tensor, Tensor]:
    """fasttune::gelu_layer_norm."""
    out, _, statistics = _forward(x, None, weight, bias, None, None, 0.0, eps, False, kind(tanh), NONE)
    return out, statistics


def layer_norm_gelu_backward(
    dout: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, tanh: bool, *needs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """fasttune::layer_norm_gelu_backward; needs: of x, weight and bias."""
    options = (None, None, 0.0, x.dtype, (needs[0], False, *needs[1:]), NONE, kind(tanh))
    dx, _, dweight, dbias = _backward(dout, None, x, weight, bias, statistics, *options)
    return dx, dweight, dbias


def gelu_layer_norm_backward(
    dout: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, tanh: bool, *needs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """fasttune::gelu_layer_norm_backward; needs: of x, weight and bias."""
    options = (None, None, 0.0, x.dtype, (needs[0], False, *needs[1:]), kind(tanh), NONE)
    dx, _, dweight, dbias = _backward(dout, None, x, weight, bias, statistics, *options)
    return dx, dweight, dbias
