"""A linear layer and the maximum over the tokens of each sequence, in torch operators. Any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune.ops._checks import autocasts


def linear_max(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """(T, C), (V, C), (V,), (N + 1,) -> (N, V): the product in the dtype of linear, then the maximum of its rows.

    A sequence without tokens is -inf and passes no gradient; of equal maxima the first token's gets the gradient.
    """
    if not autocasts(input.device):
        linear_weight = linear_weight.to(input.dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(input.dtype)
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    (rows, classes), sequences = logits.shape, cu_seqlens.shape[0] - 1
    nothing = torch.full((sequences, classes), -torch.inf, dtype=logits.dtype, device=logits.device)
    if rows == 0 or sequences == 0:
        return nothing + logits[:0].sum(0)
    row = torch.arange(rows, device=logits.device)
    owner = torch.searchsorted(cu_seqlens[1:].to(torch.int64).contiguous(), row, right=True)
    index = owner[:, None].expand(rows, classes)
    values = logits.detach()
    best = nothing.scatter_reduce(0, index, values, "amax")  # NaN where one of them is
    theirs = best.gather(0, index)
    hit = (values == theirs) | (values.isnan() & theirs.isnan())
    token = torch.full((sequences, classes), rows - 1, dtype=torch.int64, device=logits.device).scatter_reduce(
        0, index, torch.where(hit, row[:, None], rows - 1), "amin"
    )
    return torch.where((cu_seqlens.diff() > 0)[:, None], logits.gather(0, token), nothing)
