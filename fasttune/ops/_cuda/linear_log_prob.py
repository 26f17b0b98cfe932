"""csrc/cuda/log_prob.cu between the products of kernels/log_prob_chunks.py. An id out of range gives NaN."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from fasttune.kernels.log_prob_chunks import backward, forward
from fasttune.ops import _cuda
from fasttune.ops._cpp import DTYPE_CODES, address


def _rows_forward(
    logits: Tensor,
    bias: Tensor | None,
    scale: float,
    ids: Tensor | None,
    ignore_index: int,
    results: Sequence[Tensor | None],
) -> None:
    _cuda.call(
        "log_prob",
        logits,
        *(DTYPE_CODES[logits.dtype], *logits.shape, logits.data_ptr(), logits.stride(0), address(bias), scale),
        *(address(ids), ignore_index, *map(address, results)),
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
    _cuda.call(
        "log_prob_backward",
        logits,
        *(DTYPE_CODES[logits.dtype], *logits.shape, logits.data_ptr(), logits.stride(0), address(bias), scale, gain),
        *(address(ids), ignore_index, statistics.data_ptr(), *map(address, upstream), address(largest)),
    )


linear_log_prob = partial(forward, _rows_forward)
linear_log_prob_backward = partial(backward, _rows_backward)
