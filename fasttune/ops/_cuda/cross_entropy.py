"""csrc/cuda/cross_entropy.cu. A label out of range gives NaN: raising would have to wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune.ops import _cuda
from fasttune.ops._cpp import DTYPE_CODES, address

NONE, MEAN = 0, 1  # fasttune/ops/cross_entropy.py: REDUCTIONS

# Shape legend: as in fasttune/ops/cross_entropy.py.


def _unit_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[1] <= 1 or tensor.stride(1) == 1 else tensor.contiguous()


def _class_weight(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach().to(torch.float32).contiguous()


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, reduction: int
) -> tuple[Tensor, Tensor, Tensor]:
    """fasttune::cross_entropy."""
    logits, target, weight = _unit_rows(logits), target.contiguous(), _class_weight(weight)
    rows, classes = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    statistics = torch.empty((rows, 2), dtype=torch.float32, device=logits.device)
    loss_sum = torch.empty((), dtype=torch.float32, device=logits.device)
    total = torch.ones((), dtype=torch.float32, device=logits.device)
    _cuda.call(
        "cross_entropy",
        logits,
        DTYPE_CODES[logits.dtype],
        rows,
        classes,
        logits.data_ptr(),
        logits.stride(0),
        target.data_ptr(),
        address(weight),
        ignore_index,
        label_smoothing,
        loss.data_ptr(),
        statistics.data_ptr(),
        loss_sum.data_ptr() if reduction != NONE else 0,
        total.data_ptr() if reduction == MEAN else 0,
    )
    return loss if reduction == NONE else loss_sum, statistics, total


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
    """fasttune::cross_entropy_backward."""
    logits, target, weight = _unit_rows(logits), target.contiguous(), _class_weight(weight)
    dloss = dloss.float().contiguous()
    rows, classes = logits.shape
    weight_sum = None if weight is None else weight.sum()
    dlogits = torch.empty((rows, classes), dtype=logits.dtype, device=logits.device)
    _cuda.call(
        "cross_entropy_backward",
        logits,
        DTYPE_CODES[logits.dtype],
        rows,
        classes,
        logits.data_ptr(),
        logits.stride(0),
        target.data_ptr(),
        address(weight),
        address(weight_sum),
        ignore_index,
        label_smoothing,
        statistics.data_ptr(),
        dloss.data_ptr(),
        1 if reduction == NONE else 0,
        total.data_ptr() if reduction == MEAN else 0,
        dlogits.data_ptr(),
        classes,
    )
    return dlogits
