"""What losses other than cross-entropy read of the logits behind a linear layer, never more than a chunk of them.

Policy gradients, distillation and preference losses need a few numbers a row: the log-probability of the id that was
drawn, the entropy, the log-sum-exp. Forward computes them chunk by chunk (_linear_chunks.py) and keeps three statistics
a row; backward computes each chunk's logits again and turns them into their gradient in place, whatever the loss made
of the numbers: up to four upstream gradients a row come together in one factor of the softmax.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttune.ops import _backends, _cpp, _triton
from fasttune.ops._checks import autocasts, check_device, check_integer, check_linear, check_number, describe
from fasttune.ops._cuda import linear_log_prob as _cuda_linear_log_prob
from fasttune.ops._indices import check_integers, check_range
from fasttune.ops._linear_chunks import empty_gradients, rows_that_count, run_chunks
from fasttune.ops._operator import Operator, must_be_traced
from fasttune.ops._reference.linear_log_prob import linear_log_prob as linear_log_prob_reference
from fasttune.ops.cross_entropy import as_float32

# Shape legend: as in _linear_chunks.py; ids and results (N,); statistics (N, 3): largest logit m, z = sum exp(x - m),
# sum p (x - m). Results of rows that do not count are 0, their statistics are not read.


class LinearLogProb(NamedTuple):
    """What linear_log_prob returns, each of shape (...): of a row's logits x and p = softmax(x)

    log_prob: log p[id], or None without ids.
    logsumexp: log sum exp x.
    entropy: -sum p log p, in nats.
    mean_logit: mean of x over the classes.
    top1: argmax of x, int64, the first of equals.
    """

    log_prob: Tensor | None
    logsumexp: Tensor
    entropy: Tensor
    mean_logit: Tensor
    top1: Tensor


def _kept_rows(ids: Tensor | None, ignore_index: int) -> Tensor | None:
    return None if ids is None else rows_that_count(ids, ignore_index)


def _cpp_linear_log_prob(
    input: Tensor, weight: Tensor, ids: Tensor | None, bias: Tensor | None, scale: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if ids is not None:
        ids = ids.contiguous()
        check_range("linear_log_prob", "ids", ids, weight.shape[0], ignore_index)
    kept, float_bias = _kept_rows(ids, ignore_index), as_float32(bias)
    make = torch.empty if kept is None else torch.zeros
    results = [make(shape, dtype=dtype) for shape, dtype in _results(input, ids)]

    def run_rows(select: slice | Tensor, logits: Tensor, _: Tensor | None) -> None:
        n, classes = logits.shape
        parts = [x[select] if kept is None else x.new_empty((n, *x.shape[1:])) for x in results]
        chosen = None if ids is None else ids[select]
        _cpp.library.log_prob(
            *(_cpp.DTYPE_CODES[logits.dtype], n, classes, logits.data_ptr(), classes, _cpp.address(float_bias), scale),
            *(_cpp.address(chosen), *map(_cpp.address, parts)),
        )
        if kept is not None:
            for result, part in zip(results, parts, strict=True):
                result[select] = part

    run_chunks(input, weight, kept, run_rows, bias_sums=bias is not None)
    log_prob, logsumexp, entropy, mean_logit, top1, statistics = results
    return log_prob, logsumexp, entropy, mean_logit, top1, statistics


def _results(input: Tensor, ids: Tensor | None) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what forward returns: log_prob, empty without ids, to statistics."""
    rows = input.shape[0]
    floats = [((rows,), torch.float32)] * 3
    return [((0 if ids is None else rows,), torch.float32), *floats, ((rows,), torch.int64), ((rows, 3), torch.float32)]


def _fake(
    input: Tensor, weight: Tensor, ids: Tensor | None, bias: Tensor | None, scale: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    first, second, third, fourth, fifth, sixth = (
        input.new_empty(shape, dtype=dtype) for shape, dtype in _results(input, ids)
    )
    return first, second, third, fourth, fifth, sixth


def _setup_context(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    input, weight, ids, bias, ctx.scale, ctx.ignore_index, ctx.backend = args
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, weight, ids, bias, outputs[5])


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    dlog_prob, *others, _ = upstream
    input, weight, ids, bias, statistics = ctx.saved_tensors
    if ids is None:
        dlog_prob = None  # of the empty tensor that stands for no log-probabilities
    if dlog_prob is None and all(gradient is None for gradient in others):
        return (None,) * 6
    needs_input, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
    dinput, dweight, dbias = _linear_log_prob_backward(
        *(dlog_prob, *others, input, weight, ids, bias, statistics, ctx.scale, ctx.ignore_index),
        *(needs_input, needs_weight, needs_bias, ctx.backend),
    )
    return (
        dinput if needs_input else None,
        dweight if needs_weight else None,
        None,
        dbias if needs_bias else None,
        *(None, None),
    )


def _cpp_backward(
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
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    ids, float_bias = None if ids is None else ids.contiguous(), as_float32(bias)
    kept = _kept_rows(ids, ignore_index)
    upstream = [as_float32(gradient) for gradient in (dlog_prob, dlogsumexp, dentropy, dmean_logit)]
    dinput, dweight, dbias = empty_gradients(input, weight, bias, (needs_input, needs_weight, needs_bias))

    def run_rows(select: slice | Tensor, logits: Tensor, partial: Tensor | None) -> None:
        n, classes = logits.shape
        parts = [None if x is None else x[select] for x in (ids, statistics, *upstream)]
        _cpp.library.log_prob_backward(
            *(_cpp.DTYPE_CODES[logits.dtype], n, classes, logits.data_ptr(), classes, _cpp.address(float_bias), scale),
            *(*map(_cpp.address, parts), _cpp.address(partial)),
        )

    run_chunks(
        *(input, weight, kept, run_rows),
        bias_sums=bias is not None,
        dinput=dinput,
        dweight=dweight,
        dbias=dbias,
    )
    first, second, third = (
        torch.empty(0) if gradient is None or like is None else gradient.to(like.dtype)
        for gradient, like in ((dinput, input), (dweight, weight), (dbias, bias))
    )
    return first, second, third


def _fake_backward(
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
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (
        like.new_empty(like.shape) if needed and like is not None else input.new_empty(0, dtype=torch.float32)
        for needed, like in ((needs_input, input), (needs_weight, weight), (needs_bias, bias))
    )
    return first, second, third


_linear_log_prob = Operator(
    "linear_log_prob",
    "(Tensor input, Tensor weight, Tensor? ids, Tensor? bias, float scale, int ignore_index)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    {
        "cpp": _cpp_linear_log_prob,
        "triton": _triton.lazy("linear_log_prob", "linear_log_prob"),
        "cuda": _cuda_linear_log_prob.linear_log_prob,
    },
    _fake,
    setup_context=_setup_context,
    backward=_backward,
    public=5,
)
_linear_log_prob_backward = Operator(
    "linear_log_prob_backward",
    "(Tensor? dlog_prob, Tensor? dlogsumexp, Tensor? dentropy, Tensor? dmean_logit, Tensor input, Tensor weight,"
    " Tensor? ids, Tensor? bias, Tensor statistics, float scale, int ignore_index, bool needs_input,"
    " bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)",
    {
        "cpp": _cpp_backward,
        "triton": _triton.lazy("linear_log_prob", "linear_log_prob_backward"),
        "cuda": _cuda_linear_log_prob.linear_log_prob_backward,
    },
    _fake_backward,
    public=3,
)
_backends.declare("linear_log_prob", *_linear_log_prob.implementations)


def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    ids: Tensor | None,
    *,
    linear_bias: Tensor | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
) -> LinearLogProb:
    """Log-probability of an id, log-sum-exp, entropy, mean and largest class of each row of logits
    scale * (input @ linear_weight.T + linear_bias), without the logits in memory.

    input: (..., C), float32, bfloat16 or float16 (float64 on the torch backend); under autocast cast as linear would.
    linear_weight: (V, C), V at least 1, linear_bias: (V,); in the input's dtype or float32. Their gradients add up in
        float32.
    ids: integers (...), each from 0 to V - 1 or ignore_index; None leaves log_prob out, and every row counts.
    scale: a finite number, the inverse of a temperature.
    ignore_index: rows with this id are 0 in every result and get gradient 0; on a CPU they cost no product.
    backend: "cpp", "triton", "cuda", "torch" or None to choose.

    Returns a LinearLogProb: results of shape (...), float32 (float64 for float64), top1 int64. All but top1 are
    differentiable, once; backward computes the logits again, in chunks.
    A class masked by a bias of -inf adds nothing to the entropy; the mean is then -inf.

    Raises IndexError for an id out of range (on CPU, naming its position; on a GPU log_prob is NaN), TypeError and
    ValueError for arguments that do not fit together, all before anything is computed, and RuntimeError for a backend
    that cannot run here.
    """
    _check(input, linear_weight, ids, linear_bias, scale, ignore_index)
    device, shape, scale = input.device, input.shape[:-1], scale * 1.0
    chosen = _backends.choose("linear_log_prob", input, backend)
    if autocasts(device) and input.dtype != torch.float64:
        input = input.to(torch.get_autocast_dtype(device.type))
    if ids is not None:
        ids = ids if ids.dtype == torch.int64 else ids.long()
        if device.type == "cpu" and (len(shape) != 1 or chosen == "torch") and not must_be_traced(ids):
            check_range("linear_log_prob", "ids", ids, linear_weight.shape[0], ignore_index)
        ids = ids.reshape(-1)
    if input.dim() != 2:
        input = input.reshape(-1, input.shape[-1])
    if chosen == "torch":
        results: tuple[Any, ...] = linear_log_prob_reference(
            input, linear_weight, ids, linear_bias, scale, ignore_index
        )
    else:
        results = _linear_log_prob(input, linear_weight, ids, linear_bias, scale, ignore_index, chosen)
    logsumexp, entropy, mean_logit, top1 = (x.view(shape) for x in results[1:])
    log_prob = None if ids is None else results[0].view(shape)
    return LinearLogProb(log_prob, logsumexp, entropy, mean_logit, top1)


def _check(
    input: Tensor,
    linear_weight: Tensor,
    ids: Tensor | None,
    linear_bias: Tensor | None,
    scale: float,
    ignore_index: int,
) -> None:
    name = "linear_log_prob"
    check_linear(name, input, linear_weight, linear_bias)
    device = input.device
    if linear_weight.shape[0] == 0:
        raise ValueError(f"{name}: linear_weight is {describe(linear_weight)}; expected at least one class.")
    if ids is not None:
        check_integers(name, "ids", ids)
        if ids.shape != input.shape[:-1]:
            expected = tuple(input.shape[:-1])
            raise ValueError(f"{name}: ids is {describe(ids)}; expected shape {expected}, an id per row.")
        check_device(name, "ids", ids, device, "input")
    check_number(name, "scale", scale)
    if not isinstance(scale, (torch.SymFloat, torch.SymInt)) and not math.isfinite(scale):
        raise ValueError(f"{name}: scale is {scale}; expected a finite number.")
    check_integer(name, "ignore_index", ignore_index)
