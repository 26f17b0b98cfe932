"""Softmax cross-entropy, alone and behind a linear layer, in torch operators."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune.ops._checks import autocasts


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Loss of logits (N, V) against labels (N,): (N,) for reduction "none", else 0-d. float32, or float64 for float64.

    Row loss: (1 - s) w_y (lse - x_y) + s / V sum_c w_c (lse - x_c), 0 where y is ignore_index. "mean" divides the sum
    by the weights w_y of the rows that count, `normalizer` replaces that divisor.
    """
    classes = logits.shape[-1]
    log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    counted = target != ignore_index
    labels = torch.where(counted, target, 0)
    class_weight = None if weight is None else weight.detach().to(log_p.dtype)
    if classes == 0:  # no row counts, or its label would be out of range
        return _reduced(
            logits.to(log_p.dtype).sum(-1), torch.zeros_like(labels, dtype=log_p.dtype), reduction, normalizer
        )
    row_weight = torch.ones_like(labels, dtype=log_p.dtype) if class_weight is None else class_weight[labels]
    row_weight = torch.where(counted, row_weight, 0.0)
    loss = -(1.0 - label_smoothing) * row_weight * log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if label_smoothing != 0.0:
        weighted = log_p if class_weight is None else log_p * class_weight
        loss = loss - label_smoothing / classes * weighted.sum(-1)
    return _reduced(torch.where(counted, loss, 0.0), row_weight, reduction, normalizer)


def _reduced(loss: Tensor, row_weight: Tensor, reduction: str, normalizer: float | Tensor | None) -> Tensor:
    if reduction == "none":
        return loss
    if normalizer is not None:
        return loss.sum() / normalizer
    return loss.sum() if reduction == "sum" else loss.sum() / row_weight.sum()


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    normalizer: float | Tensor | None,
) -> Tensor:
    """cross_entropy of input (N, C) @ linear_weight (V, C).T + linear_bias (V,), a product in the dtype of linear."""
    if not autocasts(input.device):
        linear_weight = linear_weight.to(input.dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(input.dtype)
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    return cross_entropy(logits, target, weight, ignore_index, label_smoothing, reduction, normalizer)
