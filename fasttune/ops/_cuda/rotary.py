"""csrc/cuda/rotary.cu."""

from __future__ import annotations

from torch import Tensor

from fasttune.ops import _cuda
from fasttune.ops._cpp import DTYPE_CODES, address


def rotary(
    x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, row_ids: Tensor | None, rotated: int, inverse: bool
) -> None:
    """Writes out, contiguous, from x (B, S, N, H, D)."""
    _cuda.call(
        "rotary",
        x,
        *(DTYPE_CODES[x.dtype], DTYPE_CODES[cos.dtype], x.data_ptr(), out.data_ptr(), cos.data_ptr(), sin.data_ptr()),
        *(address(row_ids), tuple(x.shape), x.stride()[:4], *cos.shape, rotated, inverse),
    )
