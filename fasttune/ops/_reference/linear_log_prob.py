"""Numbers of each row of logits behind a linear layer: log-probability, log-sum-exp, entropy, mean, largest class."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune.ops._checks import autocasts


def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    ids: Tensor | None,
    linear_bias: Tensor | None,
    scale: float,
    ignore_index: int,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """Of logits x = scale (input (N, C) @ linear_weight (V, C).T + linear_bias (V,)), a product in the dtype of linear:
    x_id - lse or None, lse, -sum p log p, mean of x, argmax; each (N,), in float32, or float64 for float64.

    Rows whose id is ignore_index are 0 and have no gradient, whatever their input holds.
    """
    if not autocasts(input.device):
        linear_weight = linear_weight.to(input.dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(input.dtype)
    ignored = None if ids is None else ids == ignore_index
    if ignored is not None:
        input = input.masked_fill(ignored.unsqueeze(-1), 0.0)
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) * scale
    log_p = torch.log_softmax(logits, -1)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0.0, 0.0)).sum(-1)  # not 0 * -inf
    found = (logits.logsumexp(-1), entropy, logits.mean(-1), logits.argmax(-1))
    if ids is None or ignored is None:
        return None, *found
    log_prob = log_p.gather(-1, ids.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    log_prob, lse, entropy, mean_logit, top1 = (x.masked_fill(ignored, 0) for x in (log_prob, *found))
    return log_prob, lse, entropy, mean_logit, top1
