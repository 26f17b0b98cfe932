"""Rotary position embedding in torch operators, in the "rotate half" form of GPT-NeoX."""

from __future__ import annotations

import torch
from torch import Tensor

# Shape legend: x (T, H, D) or (B, S, H, D), with parts (T, N, H, D) or (B, S, N, H, D); cos, sin (P, W).


def rotary(x: Tensor, cos: Tensor, sin: Tensor, row_ids: Tensor | None, rotated: int | None) -> Tensor:
    """For the first W columns of x, of its first `rotated` parts: with h = W / 2,

    out[d] = x[d] cos[d] - x[d + h] sin[d] for d < h, else x[d] cos[d] + x[d - h] sin[d]; the rest is x.
    """
    rows = x.shape[: -2 if rotated is None else -3]
    turned = x if rotated is None else x.narrow(-3, 0, rotated)
    width = cos.shape[1]
    if row_ids is not None:
        cos, sin = cos.index_select(0, row_ids), sin.index_select(0, row_ids)
    # One row of the tables for each row of x, or for each place of a sequence; alike for parts and heads.
    places = rows if cos.shape[0] == rows.numel() else rows[-1:]
    between = (1,) * (turned.dim() - len(rows) - 1)
    computed = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table.view(*places, *between, width).to(computed) for table in (cos, sin))
    part = turned[..., :width].to(computed)
    low, high = part.chunk(2, -1)
    out = (part * cos + torch.cat((-high, low), -1) * sin).to(x.dtype)
    if width < x.shape[-1]:
        out = torch.cat((out, turned[..., width:]), -1)
    if rotated is None or rotated == x.shape[-3]:
        return out
    return torch.cat((out, x.narrow(-3, rotated, x.shape[-3] - rotated)), -3)
