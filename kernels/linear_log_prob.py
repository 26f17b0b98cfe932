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
L2. Operations: an exponential (forward two) and about 12 others an element: memory is the bound.
Tiling: as in cross_entropy.py, one row a program, tiles of 2048 elements from the row's first aligned one on, both ends
masked. An id out of range reads nothing and gives NaN.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttune.kernels import launch
from fasttune.kernels.cross_entropy import VECTOR, _logits, _split, _write_zeros, float32
from fasttune.kernels.launch import power_of_two
from fasttune.kernels.linear_chunks import narrowed, results, run_chunks, times

LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that a class masked by -inf adds nothing instead of NaN
FAR_BELOW = tl.constexpr(-128.0)  # exp is 0 from here on


@triton.jit
def _accumulate(m, z, below, total, top, row, bias, column, first, classes, scale, MASKED: tl.constexpr):
    """Of each lane, with the elements at `column`: largest logit m, Σ exp(x - m), Σ exp(x - m) (x - m), Σ x, and the
    first class with m; `first` is the class at column 0."""
    x = _logits(row, bias, column, classes, MASKED) * scale
    if MASKED:
        inside = column < classes
        x = tl.where(inside, x, float("-inf"))  # a negative scale made it inf
        total += tl.where(inside, x, 0.0)
    else:
        total += x
    at = column + first
    top = tl.where((x > m) | ((x == m) & (at < top)), at, top)
    m_new = tl.maximum(m, x)
    drop, d = tl.maximum(m - m_new, FAR_BELOW), x - m_new
    shrink, e = tl.exp(m - m_new), tl.exp(d)
    below = shrink * (below + drop * z) + e * tl.maximum(d, FAR_BELOW)
    z = shrink * z + e
    return m_new, z, below, total, top


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
        head, middle = _split(offset, classes, BLOCK)
        lane = tl.arange(0, BLOCK)
        m = tl.full([BLOCK], LOWEST, tl.float32)
        z = tl.zeros([BLOCK], tl.float32)
        below, total = z, z
        top = tl.zeros([BLOCK], tl.int32) + classes
        aligned = logits + tl.multiple_of(offset + head, VECTOR)
        aligned_bias = None if bias is None else bias + head
        for begin in range(0, middle, BLOCK):
            m, z, below, total, top = _accumulate(
                *(m, z, below, total, top, aligned, aligned_bias, begin + lane, head, classes, scale, False)
            )
        for begin in range(0, classes - middle, BLOCK):  # both ends: once, rarely twice
            column = begin + lane
            column = tl.where(column < head, column, column + middle)
            m, z, below, total, top = _accumulate(
                *(m, z, below, total, top, logits + offset, bias, column, 0, classes, scale, True)
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
    if gradient is None:
        return 0.0
    value = tl.load(gradient + row)
    return value if largest is None else value / tl.load(largest)


@triton.jit
def _write_gradient(row, out, bias, column, classes, scale, m, constant, linear, even, id, at_id, MASKED: tl.constexpr):
    d = _logits(row, bias, column, classes, MASKED) * scale - m
    dx = tl.exp(d) * (constant + linear * tl.maximum(d, FAR_BELOW)) + even + tl.where(column == id, at_id, 0.0)
    dx = dx.to(out.dtype.element_ty)
    if MASKED:
        tl.store(out + column, dx, mask=column < classes)
    else:
        tl.store(out + column, dx)


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
        head, middle = _split(offset, classes, BLOCK)
        lane = tl.arange(0, BLOCK)
        aligned = logits + tl.multiple_of(offset + head, VECTOR)
        aligned_bias = None if bias is None else bias + head
        for begin in range(0, middle, BLOCK):
            _write_gradient(
                *(aligned, aligned, aligned_bias, begin + lane, classes, scale, m, constant, linear, even),
                *(id - head, at_id, False),
            )
        for begin in range(0, classes - middle, BLOCK):
            column = begin + lane
            column = tl.where(column < head, column, column + middle)
            _write_gradient(
                *(logits + offset, logits + offset, bias, column, classes, scale, m, constant, linear, even),
                *(id, at_id, True),
            )
    else:
        _write_zeros(logits, offset, classes, BLOCK)


def _tiles(classes: int) -> dict[str, int]:
    block = min(2048, power_of_two(classes, 128))
    return {"BLOCK": block, "num_warps": launch.warps(max(1, block // 256))}


def linear_log_prob(
    input: Tensor, weight: Tensor, ids: Tensor | None, bias: Tensor | None, scale: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """fasttune::linear_log_prob: log_prob (N,), empty without ids, logsumexp, entropy, mean_logit and top1 (N,), and
    statistics (N, 3)."""
    ids, bias, rows = None if ids is None else ids.contiguous(), float32(bias), input.shape[0]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=input.device)

    log_prob, statistics = empty(0 if ids is None else rows), empty(rows, 3)
    logsumexp, entropy, mean_logit, top1 = empty(rows), empty(rows), empty(rows), empty(rows, dtype=torch.int64)

    def run_rows(part: tuple[int, int, int], logits: Tensor) -> None:
        classes = logits.shape[1]
        per_row = (None if ids is None else log_prob, logsumexp, entropy, mean_logit, top1, statistics)
        log_prob_forward_kernel[(part[2],)](
            *(logits, bias, narrowed(ids, part), *(narrowed(x, part) for x in per_row)),
            *(classes, logits.stride(0), ignore_index, scale),
            **_tiles(classes),
        )

    run_chunks(input, weight, run_rows, (False, False, False))
    return log_prob, logsumexp, entropy, mean_logit, top1, statistics


def _largest(upstream: Sequence[Tensor | None]) -> Tensor:
    """Of all |upstream gradients|, a scalar on their device; 1 if they are all 0."""
    largest = torch.stack([x.abs().max() for x in upstream if x is not None]).max()
    return torch.where(largest == 0.0, 1.0, largest)


def linear_log_prob_backward(
    dlog_prob: Tensor | None,
    dlogsumexp: Tensor | None,
    dentropy: Tensor | None,
    dmean_logit: Tensor | None,
    input: Tensor,
    weight: Tensor,
    ids: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    scale: float,
    ignore_index: int,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """fasttune::linear_log_prob_backward: the gradients of input, weight and bias."""
    ids, added = None if ids is None else ids.contiguous(), float32(bias)
    upstream = [float32(x) for x in (dlog_prob, dlogsumexp, dentropy, dmean_logit)]
    after = input.dtype == torch.float16 and input.shape[0] > 0 and any(x is not None for x in upstream)
    largest = _largest(upstream) if after else None

    def run_rows(part: tuple[int, int, int], logits: Tensor) -> None:
        classes = logits.shape[1]
        per_row = (ids, statistics, *upstream)
        log_prob_backward_kernel[(part[2],)](
            *(logits, added, *(narrowed(x, part) for x in per_row), largest),
            *(classes, logits.stride(0), ignore_index, scale, 1.0 if after else scale),
            **_tiles(classes),
        )

    gradients = run_chunks(input, weight, run_rows, needs)
    if largest is not None:
        gradients = times(gradients, scale * largest)
    dtypes = [None if like is None else like.dtype for like in (input, weight, bias)]
    dinput, dweight, dbias = results(gradients, dtypes, input.device)
    return dinput, dweight, dbias
