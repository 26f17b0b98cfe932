"""Softmax cross-entropy of logits against class indices: one pass over the logits forward, one backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _backends, _cpp, _triton
from fasttune.ops._checks import (
    autocasts,
    check_device,
    check_floating,
    check_integer,
    check_number,
    check_shape,
    describe,
)
from fasttune.ops._cuda import cross_entropy as _cuda_cross_entropy
from fasttune.ops._indices import check_integers, check_range
from fasttune.ops._operator import Operator, must_be_traced
from fasttune.ops._reference.cross_entropy import cross_entropy as cross_entropy_reference

# Shape legend: logits (N, V); target and unreduced loss (N,); class weight (V,); total: 0-d, a mean's divisor;
# statistics (N, 2): largest logit m and sum of exp(logit - m).

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
NONE, MEAN, SUM = 0, 1, 2


def unit_rows(tensor: Tensor) -> Tensor:
    """A matrix whose rows are contiguous; rows may lie apart."""
    return tensor if tensor.shape[1] <= 1 or tensor.stride(1) == 1 else tensor.contiguous()


def as_float32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(torch.float32).contiguous()


def divide(numerator: float, denominator: float) -> float:
    """IEEE division: 0 / 0 is NaN, as the mean over no rows must be."""
    if denominator != 0.0:
        return numerator / denominator
    return numerator * float("inf")


def _cpp_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, reduction: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = logits.shape
    logits, target, weight = unit_rows(logits), target.contiguous(), as_float32(weight)
    check_range("cross_entropy", "target", target, classes, ignore_index)
    loss = torch.empty(rows, dtype=torch.float32)
    statistics = torch.empty((rows, 2), dtype=torch.float32)
    labels, weights = target.data_ptr(), _cpp.address(weight)
    loss_sum = _cpp.library.cross_entropy(
        *(_cpp.DTYPE_CODES[logits.dtype], rows, classes, logits.data_ptr(), logits.stride(0), 0, labels, weights),
        *(ignore_index, label_smoothing, loss.data_ptr(), statistics.data_ptr(), 0, 0, 0, 0, 1.0, 0),
    )
    total = _cpp.library.label_weight_sum(labels, rows, weights, ignore_index) if reduction == MEAN else 1.0
    if reduction != NONE:
        loss = torch.scalar_tensor(divide(loss_sum, total), dtype=torch.float32)
    return loss, statistics, torch.scalar_tensor(total, dtype=torch.float32)


def _fake(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, reduction: int
) -> tuple[Tensor, Tensor, Tensor]:
    loss = logits.new_empty(target.shape if reduction == NONE else (), dtype=torch.float32)
    statistics = logits.new_empty((*target.shape, 2), dtype=torch.float32)
    return loss, statistics, logits.new_empty((), dtype=torch.float32)


def _setup_context(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    logits, target, weight, *ctx.options, ctx.backend = args
    ctx.save_for_backward(logits, target, weight, *outputs[1:])


def _backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
    logits, target, weight, statistics, total = ctx.saved_tensors
    dlogits = _cross_entropy_backward(dloss, logits, target, weight, statistics, total, *ctx.options, ctx.backend)
    return dlogits, None, None, None, None, None


def _cpp_backward(
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
    rows, classes = logits.shape
    logits, target, weight, dloss = (
        unit_rows(logits),
        target.contiguous(),
        as_float32(weight),
        dloss.float().contiguous(),
    )
    dlogits = _cpp.empty_large((rows, classes), logits.dtype)
    _cpp.library.cross_entropy(
        *(_cpp.DTYPE_CODES[logits.dtype], rows, classes, logits.data_ptr(), logits.stride(0), 0, target.data_ptr()),
        *(_cpp.address(weight), ignore_index, label_smoothing, 0, statistics.data_ptr(), dlogits.data_ptr(), classes),
        *(dloss.data_ptr(), 1 if reduction == NONE else 0, divide(1.0, total.item()), 0),
    )
    return dlogits


def _fake_backward(dloss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


_cross_entropy = Operator(
    "cross_entropy",
    "(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, int reduction)"
    " -> (Tensor, Tensor, Tensor)",
    {
        "cpp": _cpp_cross_entropy,
        "triton": _triton.lazy("cross_entropy", "cross_entropy"),
        "cuda": _cuda_cross_entropy.cross_entropy,
    },
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
_cross_entropy_backward = Operator(
    "cross_entropy_backward",
    "(Tensor dloss, Tensor logits, Tensor target, Tensor? weight, Tensor statistics, Tensor total, int ignore_index,"
    " float label_smoothing, int reduction) -> Tensor",
    {
        "cpp": _cpp_backward,
        "triton": _triton.lazy("cross_entropy", "cross_entropy_backward"),
        "cuda": _cuda_cross_entropy.cross_entropy_backward,
    },
    _fake_backward,
)
_backends.declare("cross_entropy", *_cross_entropy.implementations)


def check_loss_arguments(
    operation: str,
    target: Tensor,
    shape: torch.Size,
    classes: int,
    device: torch.device,
    weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
    ignore_index: int,
) -> None:
    """What cross_entropy and linear_cross_entropy ask of the arguments they share."""
    check_integers(operation, "target", target)
    if target.shape != shape:
        raise ValueError(f"{operation}: target is {describe(target)}; expected shape {tuple(shape)}, a label per row.")
    if target.device != device:
        check_device(operation, "target", target, device, "the logits")
    if weight is not None:
        check_floating(operation, "weight", weight)
        check_shape(operation, "weight", weight, (classes,), "one per class")
        check_device(operation, "weight", weight, device, "the logits")
    check_integer(operation, "ignore_index", ignore_index)
    check_number(operation, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{operation}: label_smoothing is {label_smoothing}; expected a value between 0 and 1.")
    if reduction not in tuple(REDUCTIONS):
        raise ValueError(f"{operation}: reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}.")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """torch.nn.functional.cross_entropy for class indices, with the classes last and float32 arithmetic.

    logits: (..., V), float32, bfloat16 or float16 (float64 on the torch backend).
    target: integers (...), each from 0 to V - 1 or ignore_index.
    weight: (V,), rescales each class; a constant, it gets no gradient.
    ignore_index: rows with this label count nowhere and get a zero gradient.
    label_smoothing: share of the target spread evenly over the classes (Szegedy et al. 2015).
    reduction: "mean" (divides by the sum of the labels' weights; NaN if no row counts), "sum" or "none".
    backend: "cpp", "triton", "cuda", "torch" or None to choose.

    Returns a scalar, or (...) for reduction "none"; in the logits' dtype, under autocast in float32.

    Raises IndexError for a label out of range (on CPU, naming its position), TypeError and ValueError for arguments
    that do not fit together, all before anything is computed, and RuntimeError for a backend that cannot run here.
    """
    check_floating("cross_entropy", "logits", logits)
    if logits.dim() == 0:
        raise ValueError(f"cross_entropy: logits is {describe(logits)}; expected shape (..., V) with the classes last.")
    shape, classes, device = logits.shape[:-1], logits.shape[-1], logits.device
    check_loss_arguments(
        "cross_entropy", target, shape, classes, device, weight, label_smoothing, reduction, ignore_index
    )
    chosen = _backends.choose("cross_entropy", logits, backend)
    labels = target if target.dtype == torch.int64 else target.long()
    if len(shape) != 1:
        if device.type == "cpu" and not must_be_traced(labels):
            check_range("cross_entropy", "target", labels, classes, ignore_index)  # names the position in `target`
        logits, labels = logits.reshape(-1, classes), labels.reshape(-1)
    if chosen == "torch":
        if device.type == "cpu" and not must_be_traced(labels):
            check_range("cross_entropy", "target", labels, classes, ignore_index)
        loss = cross_entropy_reference(logits, labels, weight, ignore_index, label_smoothing, reduction)
    else:
        code = REDUCTIONS[reduction]
        loss = _cross_entropy(logits, labels, weight, ignore_index, label_smoothing, code, chosen)
    if loss.dtype != logits.dtype and not autocasts(device):
        loss = loss.to(logits.dtype)
    return loss.view(shape) if reduction == "none" else loss
