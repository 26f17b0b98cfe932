"""Log-probability of an id, log-sum-exp, entropy, mean and largest class of rows of logits behind a linear layer.

Of a row x_c = s (u_c + b_c), c of V classes, with m = max_c x_c, d_c = x_c - m, z = Σ_c exp(d_c), p_c = exp(d_c) / z
and e = Σ_c p_c d_c: log_prob = d_y - log z for the id y, logsumexp = m + log z, entropy = -Σ_c p_c log p_c = log z - e,
mean = Σ_c x_c / V, top1 the first c with x_c = m. Backward, with upstream gradients a, l, h and g of the first four,
since ∂entropy/∂x_c = -p_c (log p_c + entropy) = -p_c (d_c - e):
    du_c = s (p_c (l - a - h (d_c - e)) + g / V + [c = y] a).
m, z and e are kept for it. Rows whose id is ignore_index are 0 and get gradient 0, and are only written.
Source: online softmax, Milakov and Gimelshein 2018; the entropy's sum is carried along: where m rises by r, z becomes
z exp(-r) and Σ exp(d) d becomes exp(-r) (Σ exp(d) d - r z).

Forward is one pass over a chunk's logits (linear_chunks.py): every lane keeps running values of its own, merged once at
the row's end. Backward computes the chunk's logits again by their product and replaces them by their gradient in place,
in which up to four upstream gradients come together. float16 cannot hold p times a small upstream gradient: there the
rows get their share of the largest one, and the products are multiplied by it, in float32, on the device.

Bytes: forward the logits once, backward logits and gradient once each; about 60 more a row; the bias once a row, from
L2. Operations: an exponential and about 12 others an element: memory is the bound.
Tiling: one row a program, 2048 elements at a time, as in cross_entropy.py; but here rows start at whole vectors, since
the chunks' buffer is padded. An id out of range reads nothing and gives NaN.
"""

from collections.abc import Sequence
from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from fasttune.kernels import launch
from fasttune.kernels.cross_entropy import VECTOR, _logits, _write_zeros
from fasttune.kernels.launch import power_of_two
from fasttune.kernels.log_prob_chunks import backward, forward

LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that a class masked by -inf adds nothing instead of NaN
FAR_BELOW = tl.constexpr(-128.0)  # exp is 0 from here on


@triton.jit
def _accumulate(m, z, below, total, top, row, bias, column, classes, scale, MASKED: tl.constexpr):
    """Of each lane, with the elements at `column`: largest logit m, Σ exp(x - m), Σ exp(x - m) (x - m), Σ x, and the
    first class with m."""
    x = _logits(row, bias, column, classes, MASKED) * scale
    if MASKED:
        inside = column < classes
        x = tl.where(inside, x, float("-inf"))  # a negative scale made it inf
        total += tl.where(inside, x, 0.0)
    else:
        total += x
    rises, d = x > m, -tl.abs(x - m)
    d = tl.where(d < FAR_BELOW, FAR_BELOW, d)  # NaN stays
    e = tl.exp(d)  # of the smaller one of x and m: the other's is 1
    top = tl.where(rises, column, top)
    below = tl.where(rises, e, 1.0) * below + e * d * tl.where(rises, z, 1.0)
    z = tl.where(rises, e * z + 1.0, z + e)
    return tl.where(rises, x, m), z, below, total, top


@triton.jit(do_not_specialize=["classes", "stride", "ignore_index"])
def log_prob_forward_kernel(
    logits,
    bias,
    ids,
    log_prob,
    logsumexp,
    entropy,
    mean_logit,
    top1,
    statistics,
    classes,
    stride,
    ignore_index,
    scale,
    BLOCK: tl.constexpr,
):
    """One row a program. statistics: (rows, 3); ids and log_prob: None without ids."""
    row = tl.program_id(0)
    offset = row.to(tl.int64) * stride
    counts = True
    if ids is not None:
        id = tl.load(ids + row)
        counts = id != ignore_index
    if counts:
        whole = classes // BLOCK * BLOCK
        lane = tl.arange(0, BLOCK)
        m = tl.full([BLOCK], LOWEST, tl.float32)
        z = tl.zeros([BLOCK], tl.float32)
        below, total = z, z
        top = tl.zeros([BLOCK], tl.int32) + classes
        x_row = logits + tl.multiple_of(offset, VECTOR)
        for begin in range(0, whole, BLOCK):
            m, z, below, total, top = _accumulate(
                *(m, z, below, total, top, x_row, bias, begin + lane, classes, scale, False)
            )
        if whole < classes:
            m, z, below, total, top = _accumulate(
                *(m, z, below, total, top, x_row, bias, whole + lane, classes, scale, True)
            )
        largest = tl.max(m, 0)
        shrink, drop = tl.exp(m - largest), tl.maximum(m - largest, FAR_BELOW)
        below = tl.sum(shrink * (below + drop * z), 0)
        z = tl.sum(shrink * z, 0)
        first = tl.min(tl.where(m == largest, top, classes), 0)
        log_z, e = tl.log(z), below / z
        if ids is not None:
            inside = (id >= 0) & (id < classes)
            x = tl.load(logits + offset + id, mask=inside, other=float("nan")).to(tl.float32)
            if bias is not None:
                x += tl.load(bias + id, mask=inside, other=0.0).to(tl.float32)
            tl.store(log_prob + row, x * scale - largest - log_z)
        tl.store(logsumexp + row, largest + log_z)
        tl.store(entropy + row, log_z - e)
        tl.store(mean_logit + row, tl.sum(total, 0) / classes)
        tl.store(top1 + row, tl.where(first < classes, first, 0).to(tl.int64))
        tl.store(statistics + 3 * row, largest)
        tl.store(statistics + 3 * row + 1, z)
        tl.store(statistics + 3 * row + 2, e)
    else:
        if log_prob is not None:
            tl.store(log_prob + row, 0.0)
        tl.store(logsumexp + row, 0.0)
        tl.store(entropy + row, 0.0)
        tl.store(mean_logit + row, 0.0)
        tl.store(top1 + row, tl.zeros([], tl.int64))
        tl.store(statistics + 3 * row, 0.0)
        tl.store(statistics + 3 * row + 1, 1.0)
        tl.store(statistics + 3 * row + 2, 0.0)


@triton.jit
def _upstream(gradient, row, largest):
    """The row's upstream gradient, 0 for None, over the largest of all where that is given."""
    value = 0.0
    if gradient is not None:
        value = tl.load(gradient + row)
        if largest is not None:
            value /= tl.load(largest)
    return value


@triton.jit
def _write_gradient(row, bias, column, classes, scale, m, constant, linear, even, id, at_id, MASKED: tl.constexpr):
    d = _logits(row, bias, column, classes, MASKED) * scale - m
    dx = tl.exp(d) * (constant + linear * tl.maximum(d, FAR_BELOW)) + even + tl.where(column == id, at_id, 0.0)
    dx = dx.to(row.dtype.element_ty)
    if MASKED:
        tl.store(row + column, dx, mask=column < classes)
    else:
        tl.store(row + column, dx)


@triton.jit(do_not_specialize=["classes", "stride", "ignore_index"])
def log_prob_backward_kernel(
    logits,
    bias,
    ids,
    statistics,
    dlog_prob,
    dlogsumexp,
    dentropy,
    dmean_logit,
    largest,
    classes,
    stride,
    ignore_index,
    scale,
    gain,
    BLOCK: tl.constexpr,
):
    """One row a program, replaced by its gradient times gain, over `largest` where it is not None."""
    row = tl.program_id(0)
    offset = row.to(tl.int64) * stride
    counts = True
    id = tl.full([], -1, tl.int64)
    if ids is not None:
        id = tl.load(ids + row)
        counts = id != ignore_index
    if counts:
        m, z, e = tl.load(statistics + 3 * row), tl.load(statistics + 3 * row + 1), tl.load(statistics + 3 * row + 2)
        a, h = _upstream(dlog_prob, row, largest), _upstream(dentropy, row, largest)
        if dlog_prob is not None:
            a = tl.where((id >= 0) & (id < classes), a, float("nan"))
        constant = gain * (_upstream(dlogsumexp, row, largest) - a + h * e) / z
        linear = -gain * h / z
        even = gain * _upstream(dmean_logit, row, largest) / classes
        at_id = gain * a
        whole = classes // BLOCK * BLOCK
        lane = tl.arange(0, BLOCK)
        x_row = logits + tl.multiple_of(offset, VECTOR)
        for begin in range(0, whole, BLOCK):
            _write_gradient(x_row, bias, begin + lane, classes, scale, m, constant, linear, even, id, at_id, False)
        if whole < classes:
            _write_gradient(x_row, bias, whole + lane, classes, scale, m, constant, linear, even, id, at_id, True)
    else:
        _write_zeros(logits, offset, classes, BLOCK)


def _tiles(classes: int) -> dict[str, int]:
    block = min(2048, power_of_two(classes, 128))
    return {"BLOCK": block, "num_warps": launch.warps(max(1, block // 256))}


def _rows_forward(
    logits: Tensor,
    bias: Tensor | None,
    scale: float,
    ids: Tensor | None,
    ignore_index: int,
    results: Sequence[Tensor | None],
) -> None:
    rows, classes = logits.shape
    log_prob_forward_kernel[(rows,)](
        *(logits, bias, ids, *results, classes, logits.stride(0), ignore_index, scale), **_tiles(classes)
    )


def _rows_backward(
    logits: Tensor,
    bias: Tensor | None,
    scale: float,
    ids: Tensor | None,
    ignore_index: int,
    statistics: Tensor,
    upstream: Sequence[Tensor | None],
    largest: Tensor | None,
    gain: float,
) -> None:
    rows, classes = logits.shape
    log_prob_backward_kernel[(rows,)](
        *(logits, bias, ids, statistics, *upstream, largest, classes, logits.stride(0), ignore_index, scale, gain),
        **_tiles(classes),
    )


linear_log_prob = partial(forward, _rows_forward)
linear_log_prob_backward = partial(backward, _rows_backward)
