"""Cross-entropy of logits, and of a linear layer's output that is never materialised."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttune import ops


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """nn.CrossEntropyLoss (same arguments, attributes and state_dict) in one pass over the logits.

    The fused kernel runs for class indices with logits (N, C) or (C,). Class probabilities as target and logits with
    further dimensions, (N, C, d1, ...), run torch's own implementation.

    Shapes: input (N, C) or (C,), target int64 (N,) or (); output () or, with reduction="none", like target.
    Raises IndexError for a class outside [0, C) that is not ignore_index, ValueError for shapes that do not fit.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if input.dim() > 2 or target.dtype.is_floating_point:
            return super().forward(input, target)
        return ops.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )


class LinearCrossEntropyLoss(nn.Module):
    """Cross-entropy of linear(input) computed in chunks of rows: the logits never exist as a whole.

    Arguments, attributes and state_dict (linear.weight, linear.bias, weight) are those of nn.LinearCrossEntropyLoss in
    torch 2.13, which need not be there. Rows whose target is ignore_index are dropped before the product. Unlike
    torch's chunked path it may be differentiated several times. Class probabilities as target and out_features run as
    a plain linear layer and cross-entropy; `options`, torch's choices for its own chunks, makes torch's function run.

    Shapes: input (N, in_features) or (in_features,), target int64 (N,) or (), output () or, with reduction="none",
    like target. With out_features (d1, ...): target (N, d1, ...).
    normalizer: divides the sum instead of the number of targets, for reduction="mean" (Trainer's num_items_in_batch).
    Raises IndexError for a class outside [0, num_classes) that is not ignore_index, ValueError for shapes and options
    that do not fit.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        name = "LinearCrossEntropyLoss"
        if weight is not None and tuple(weight.shape) != (num_classes,):
            raise ValueError(f"{name}: weight has shape {tuple(weight.shape)}; expected {(num_classes,)}.")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"{name}: label_smoothing is {label_smoothing}; expected a number between 0 and 1.")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"{name}: reduction is {reduction!r}; expected 'mean', 'sum' or 'none'.")
        if options is not None and not hasattr(F, "linear_cross_entropy"):
            raise ValueError(f"{name}: options belong to torch's chunked loss, which torch {torch.__version__} lacks.")
        super().__init__()
        self.register_buffer("weight", weight)
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.linear = nn.Linear(
            in_features, math.prod(self.out_features, start=num_classes), bias=bias, device=device, dtype=dtype
        )
        self.options = options

    def forward(self, input: Tensor, target: Tensor, *, normalizer: Tensor | float | None = None) -> Tensor:
        if self.options is None and not self.out_features and not target.dtype.is_floating_point:
            return self._fused(input, target, normalizer)
        if normalizer is not None:
            raise ValueError(
                "LinearCrossEntropyLoss: normalizer goes with class indices, without out_features and options."
            )
        return self._stock(input, target)

    def _fused(self, input: Tensor, target: Tensor, normalizer: Tensor | float | None) -> Tensor:
        return ops.linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            ignore_index=-100 if self.ignore_index is None else self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            normalizer=normalizer,
        )

    def _stock(self, input: Tensor, target: Tensor) -> Tensor:
        outputs = (self.num_classes, *self.out_features)
        if self.options is not None:
            bias = self.linear.bias
            return F.linear_cross_entropy(
                input,
                self.linear.weight.reshape(*outputs, -1),
                target,
                linear_bias=None if bias is None else bias.reshape(outputs),
                weight=self.weight,
                reduction=self.reduction,
                ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing,
                options=self.options,
            )
        return F.cross_entropy(
            self.linear(input).unflatten(-1, outputs),
            target,
            weight=self.weight,
            ignore_index=-100 if self.ignore_index is None else self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, out_features={self.out_features},"
            f" bias={self.linear.bias is not None}, reduction={self.reduction}, ignore_index={self.ignore_index},"
            f" label_smoothing={self.label_smoothing}, options={self.options}"
        )
