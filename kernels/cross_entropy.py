"""loss_r = (1 - s) w_y (lse - x_y) + s / V Σ_c w_c (lse - x_c) for rows x_r of logits (+ bias), y their label.

s is the label smoothing, w the class weights (1 without), lse = m + log Σ, m = max_c x_c, Σ = Σ_c exp(x_c - m): the two
parts stay apart, since their sum would round away what a large m leaves. A row with ignore_index has loss 0 and
gradient 0. Backward, with p_c = exp(x_c - m) / Σ and u the row's upstream gradient over the mean's divisor:
    dx_c = u ((1 - s) w_y (p_c - [c = y]) + s / V (p_c Σ_k w_k - w_c)).
Source: online softmax, Milakov and Gimelshein 2018; smoothing, Szegedy et al. 2015.

Forward is one pass: every lane keeps a running maximum and sum of its own, merged once at the row's end, so no tile
waits for a reduction. For a chunk of linear_cross_entropy the same program then writes the gradient over the logits;
what it reads again it has just read (100 KB a row at V = 50257: from L2). An ignored row is only written.

Bytes: forward the logits once, backward logits and gradient once each, the chunk step logits once from memory and once
from L2 and the gradient once; about 24 more a row; bias and class weights, if any, once a row from L2. Operations: an
exponential and about 8 others an element each way: memory is the bound.
Tiling: one row a program, 2048 elements at a time (with 4096, smoothing makes it spill). A vocabulary of 50257
starts most rows at an address that no vector load accepts: the tiles begin at the row's first aligned element and carry
no mask, and what is left at both ends goes through masked tiles. A label out of range reads nothing and gives NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttune.kernels import launch
from fasttune.kernels.launch import power_of_two

NONE, MEAN = 0, 1  # reductions, as fasttune.ops.cross_entropy numbers them; 2 is the sum
VECTOR = tl.constexpr(8)  # elements of 16 bits in a 16-byte access


@triton.jit
def _split(offset, classes, BLOCK: tl.constexpr):
    """How many columns precede the first aligned element of a row that starts at `offset`, and how many from there on
    fill whole tiles."""
    head = tl.minimum((VECTOR - offset % VECTOR) % VECTOR, classes).to(tl.int32)
    return head, (classes - head) // BLOCK * BLOCK


@triton.jit
def _load(pointer, column, classes, other, MASKED: tl.constexpr):
    """float32 values at the columns, `other` beyond `classes`."""
    if MASKED:
        return tl.load(pointer + column, mask=column < classes, other=other).to(tl.float32)
    return tl.load(pointer + column).to(tl.float32)


@triton.jit
def _logits(row, bias, column, classes, MASKED: tl.constexpr):
    x = _load(row, column, classes, float("-inf"), MASKED)
    if bias is not None:
        x += _load(bias, column, classes, 0.0, MASKED)
    return x


@triton.jit
def _accumulate(
    m, total, weights, weighted, near, row, bias, weight, column, classes, SMOOTH: tl.constexpr, MASKED: tl.constexpr
):
    x = _logits(row, bias, column, classes, MASKED)
    m_new = tl.maximum(m, x)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # a lane that has seen nothing stays at 0, not NaN
    total = total * tl.exp(m - shift) + tl.exp(x - shift)
    if SMOOTH:
        x -= near
        if MASKED:
            x = tl.where(column < classes, x, 0.0)
        if weight is not None:
            w = _load(weight, column, classes, 0.0, MASKED)
            weights += w
            x *= w
        weighted += x
    return m_new, total, weights, weighted


@triton.jit
def _statistics(logits, offset, bias, weight, classes, near, SMOOTH: tl.constexpr, BLOCK: tl.constexpr):
    """Of the row at `offset`: m, Σ exp(x - m), Σ w, Σ w (x - near); the last two for SMOOTH alone. near: a number like
    the row's, without which the last sum would cancel where logits lie far from 0."""
    head, middle = _split(offset, classes, BLOCK)
    lane = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weights, weighted = total, total
    row = logits + tl.multiple_of(offset + head, VECTOR)
    bias_row, weight_row = None if bias is None else bias + head, None if weight is None else weight + head
    for first in range(0, middle, BLOCK):
        m, total, weights, weighted = _accumulate(
            *(m, total, weights, weighted, near, row, bias_row, weight_row, first + lane, classes, SMOOTH, False)
        )
    row = logits + offset
    for first in range(0, classes - middle, BLOCK):  # both ends: once, rarely twice
        column = first + lane
        column = tl.where(column < head, column, column + middle)
        m, total, weights, weighted = _accumulate(
            *(m, total, weights, weighted, near, row, bias, weight, column, classes, SMOOTH, True)
        )
    largest = tl.max(m, 0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    return largest, tl.sum(total * tl.exp(m - shift), 0), tl.sum(weights, 0), tl.sum(weighted, 0)


@triton.jit
def _write_gradient(
    row,
    gradient,
    bias,
    weight,
    column,
    classes,
    label,
    m,
    of_exp,
    at_label,
    of_weight,
    SMOOTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    dx = of_exp * tl.exp(_logits(row, bias, column, classes, MASKED) - m) - tl.where(column == label, at_label, 0.0)
    if SMOOTH:
        dx -= of_weight if weight is None else of_weight * _load(weight, column, classes, 0.0, MASKED)
    dx = dx.to(gradient.dtype.element_ty)
    if MASKED:
        tl.store(gradient + column, dx, mask=column < classes)
    else:
        tl.store(gradient + column, dx)


@triton.jit
def _gradient(
    logits,
    offset,
    gradient,
    gradient_offset,
    bias,
    weight,
    classes,
    label,
    m,
    total,
    weights,
    smoothing,
    upstream,
    SMOOTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the row of the gradient. m, total: the row's statistics; weights: Σ w, for SMOOTH; ALIGNED: both offsets
    leave the same remainder."""
    head, middle = _split(offset, classes, BLOCK)
    lane = tl.arange(0, BLOCK)
    at_label = upstream * (1.0 - smoothing) * _label_weight(weight, label, classes)
    of_weight = upstream * smoothing / classes
    of_exp = (at_label + of_weight * weights if SMOOTH else at_label) / total
    row, out = logits + tl.multiple_of(offset + head, VECTOR), gradient + gradient_offset + head
    if ALIGNED:
        out = gradient + tl.multiple_of(gradient_offset + head, VECTOR)
    bias_row, weight_row = None if bias is None else bias + head, None if weight is None else weight + head
    for first in range(0, middle, BLOCK):
        _write_gradient(
            *(row, out, bias_row, weight_row, first + lane, classes, label - head, m, of_exp, at_label, of_weight),
            *(SMOOTH, False),
        )
    row, out = logits + offset, gradient + gradient_offset
    for first in range(0, classes - middle, BLOCK):
        column = first + lane
        column = tl.where(column < head, column, column + middle)
        _write_gradient(*(row, out, bias, weight, column, classes, label, m, of_exp, at_label, of_weight, SMOOTH, True))


@triton.jit
def _label_weight(weight, label, classes):
    """w_y; NaN for a label out of range, which reads nothing."""
    inside = (label >= 0) & (label < classes)
    if weight is None:
        w = tl.where(inside, 1.0, float("nan"))
    else:
        w = tl.load(weight + label, mask=inside, other=float("nan"))
    return w


@triton.jit
def _row_upstream(dloss, divisor, scale, row, PER_ROW: tl.constexpr):
    """scale × upstream gradient of the row / divisor, each 1 where it is None."""
    upstream = scale
    if dloss is not None:
        upstream *= tl.load(dloss + row) if PER_ROW else tl.load(dloss)
    if divisor is not None:
        upstream /= tl.load(divisor)
    return upstream


@triton.jit
def _write_zeros(gradient, offset, classes, BLOCK: tl.constexpr):
    for first in range(0, classes, BLOCK):
        column = first + tl.arange(0, BLOCK)
        tl.store(gradient + offset + column, tl.zeros([BLOCK], gradient.dtype.element_ty), mask=column < classes)


@triton.jit(do_not_specialize=["classes", "stride", "ignore_index"])
def cross_entropy_forward_kernel(
    logits,
    bias,
    target,
    weight,
    loss,
    statistics,
    gradient,
    dloss,
    divisor,
    classes,
    stride,
    ignore_index,
    smoothing,
    scale,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program. statistics: (rows, 2) or None; gradient: None, or the logits, which it then replaces."""
    row = tl.program_id(0)
    offset = row.to(tl.int64) * stride
    label = tl.load(target + row)
    if label == ignore_index:
        tl.store(loss + row, 0.0)
        if statistics is not None:
            tl.store(statistics + 2 * row, 0.0)
            tl.store(statistics + 2 * row + 1, 1.0)
        if gradient is not None:
            _write_zeros(gradient, offset, classes, BLOCK)
    else:
        at_label = tl.load(logits + offset + label, mask=(label >= 0) & (label < classes), other=float("nan"))
        at_label = at_label.to(tl.float32)
        if bias is not None:
            at_label += tl.load(bias + label, mask=(label >= 0) & (label < classes), other=0.0).to(tl.float32)
        near = tl.where(tl.abs(at_label) < float("inf"), at_label, 0.0)
        m, total, weights, weighted = _statistics(logits, offset, bias, weight, classes, near, SMOOTH, BLOCK)
        log_total = tl.log(total)
        value = (1.0 - smoothing) * _label_weight(weight, label, classes) * (log_total + (m - at_label))
        if weight is None:
            weights = classes.to(tl.float32)
        if SMOOTH:
            value += smoothing / classes * (log_total * weights + ((m - near) * weights - weighted))
        tl.store(loss + row, value)
        if statistics is not None:
            tl.store(statistics + 2 * row, m)
            tl.store(statistics + 2 * row + 1, total)
        if gradient is not None:
            _gradient(
                *(logits, offset, gradient, offset, bias, weight, classes, label, m, total, weights, smoothing),
                *(_row_upstream(dloss, divisor, scale, row, True), SMOOTH, True, BLOCK),
            )


@triton.jit(do_not_specialize=["classes", "stride", "ignore_index"])
def cross_entropy_backward_kernel(
    dloss,
    logits,
    target,
    weight,
    statistics,
    divisor,
    weights,
    gradient,
    classes,
    stride,
    ignore_index,
    smoothing,
    PER_ROW: tl.constexpr,
    SMOOTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program. weights: Σ w, a scalar on the device, where there are weights and smoothing."""
    row = tl.program_id(0)
    offset, gradient_offset = row.to(tl.int64) * stride, row.to(tl.int64) * classes
    label = tl.load(target + row)
    if label == ignore_index:
        _write_zeros(gradient, gradient_offset, classes, BLOCK)
    else:
        m, total = tl.load(statistics + 2 * row), tl.load(statistics + 2 * row + 1)
        weight_sum = classes.to(tl.float32) if weights is None else tl.load(weights)
        _gradient(
            *(logits, offset, gradient, gradient_offset, None, weight, classes, label, m, total, weight_sum, smoothing),
            *(_row_upstream(dloss, divisor, 1.0, row, PER_ROW), SMOOTH, ALIGNED, BLOCK),
        )


@triton.jit(do_not_specialize=["rows", "classes", "ignore_index"])
def loss_sums_kernel(
    loss,
    target,
    weight,
    divisor,
    out,
    total,
    rows,
    classes,
    ignore_index,
    scale,
    BLOCK: tl.constexpr,
):
    """out = scale Σ loss / divisor; total = Σ of the weights of the labels that count, where asked, is the divisor.

    One program: 4 to 12 bytes a row, and a fixed order of additions.
    """
    sums, counted = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        inside = row < rows
        if loss is not None:
            sums += tl.load(loss + row, mask=inside, other=0.0)
        if total is not None:
            label = tl.load(target + row, mask=inside, other=ignore_index)
            counts = inside & (label != ignore_index)
            if weight is None:
                counted += counts.to(tl.float32)
            else:
                counted += tl.load(weight + label, mask=counts & (label >= 0) & (label < classes), other=0.0)
    value = tl.sum(sums, 0) * scale
    if total is not None:
        weights = tl.sum(counted, 0)
        tl.store(total, weights)
        value = tl.div_rn(value, weights)
    elif divisor is not None:
        value = tl.div_rn(value, tl.load(divisor))
    if out is not None:
        tl.store(out, value)


def _unit_rows(x: Tensor) -> Tensor:
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to(torch.float32).contiguous()


def _tiles(classes: int) -> dict[str, int]:
    block = min(2048, power_of_two(classes, 128))
    return {"BLOCK": block, "num_warps": launch.warps(max(1, block // 256))}


def loss_sums(
    loss: Tensor | None,
    target: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    *,
    out: Tensor | None = None,
    total: Tensor | None = None,
    divisor: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """Fills out () and total (), float32, as loss_sums_kernel says, from loss (N,) and target (N,)."""
    rows = (target if loss is None else loss).shape[0]
    classes = 0 if weight is None else weight.shape[0]
    loss_sums_kernel[(1,)](
        *(loss, target, weight, divisor, out, total, rows, classes, ignore_index, scale),
        BLOCK=1024,
        num_warps=launch.warps(8),
    )


def rows_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    loss: Tensor,
    *,
    bias: Tensor | None = None,
    statistics: Tensor | None = None,
    in_place: bool = False,
    dloss: Tensor | None = None,
    divisor: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """Fills loss (N,) and statistics (N, 2); in_place turns logits (N, V) into scale dloss / divisor times gradient.

    logits: unit stride along the classes; dloss: float32 (N,); divisor: float32 ().
    """
    rows, classes = logits.shape
    if not rows:
        return
    cross_entropy_forward_kernel[(rows,)](
        *(logits, bias, target, weight, loss, statistics, logits if in_place else None, dloss, divisor),
        *(classes, logits.stride(0), ignore_index, label_smoothing, scale),
        SMOOTH=label_smoothing != 0.0,
        **_tiles(classes),
    )


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, reduction: int
) -> tuple[Tensor, Tensor, Tensor]:
    """fasttune::cross_entropy: (loss (N,) or (), statistics (N, 2), total ()), all float32."""
    logits, target, weight = _unit_rows(logits), target.contiguous(), float32(weight)
    rows, device = logits.shape[0], logits.device
    loss = torch.empty(rows, dtype=torch.float32, device=device)
    statistics = torch.empty((rows, 2), dtype=torch.float32, device=device)
    rows_forward(logits, target, weight, ignore_index, label_smoothing, loss, statistics=statistics)
    if reduction == MEAN:
        total = torch.empty((), dtype=torch.float32, device=device)
    else:
        total = torch.ones((), dtype=torch.float32, device=device)
    if reduction == NONE:
        return loss, statistics, total
    out = torch.empty((), dtype=torch.float32, device=device)
    loss_sums(loss, target, weight, ignore_index, out=out, total=total if reduction == MEAN else None)
    return out, statistics, total


def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    total: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
) -> Tensor:
    """fasttune::cross_entropy_backward: the gradient (N, V) of logits."""
    logits, target, weight = _unit_rows(logits), target.contiguous(), float32(weight)
    rows, classes = logits.shape
    dlogits = torch.empty((rows, classes), dtype=logits.dtype, device=logits.device)
    if not rows:
        return dlogits
    cross_entropy_backward_kernel[(rows,)](
        *(dloss.float().contiguous(), logits, target, weight, statistics, total if reduction == MEAN else None),
        *(weight.sum() if weight is not None and label_smoothing else None, dlogits),
        *(classes, logits.stride(0), ignore_index, label_smoothing),
        PER_ROW=reduction == NONE,
        SMOOTH=label_smoothing != 0.0,
        ALIGNED=(logits.stride(0) - classes) % VECTOR.value == 0,
        **_tiles(classes),
    )
    return dlogits
