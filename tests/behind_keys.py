"""Queries behind the last key of their sequence or before its first one, and what they must see: each sequence for
itself, densely."""

import torch
from torch import Tensor

from fasttune.ops._reference.philox import attention_keep_mask, keep_scale

FIRST, LAST = -(2**30), 2**31 - 1  # the furthest positions there can be

# Number of keys of each sequence beside the positions of its queries: one at padding, one far away and more than a
# tile of each; cross-attention, more queries than keys and fewer; no keys at all, one key; within, at the end, behind;
# before, at padding on the left, as more than a tile of them, and far away.
CASES = {
    "at padding": ([5, 70, 40], [[5], [100, LAST], list(range(30, 140))]),
    "cross-attention": ([7, 150], [list(range(90)), list(range(20))]),
    "no key, one key": ([0, 1, 20], [[0, 9], [0, 1, 2], list(range(5, 45))]),
    "within and behind": ([130, 66], [[0, 63, 64, 128, 129, 130, 131, 500], [*range(40, 90, 2), 89, 89]]),
    "before": ([5, 90, 70, 1], [[-3, -1], list(range(-20, 60)), [FIRST, -66, -1, 0, 40], [-2, -1, 0]]),
    "no key at all": ([0, 0], [[0], [3, 3]]),
}


def layout(case: str) -> dict[str, Tensor]:
    lengths, positions = CASES[case]
    counts = [len(chosen) for chosen in positions]
    return {
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
        "cu_seqlens_q": torch.tensor([0, *counts]).cumsum(0),
        "positions_q": torch.tensor([at for chosen in positions for at in chosen], dtype=torch.int64),
    }


def tensors(case: str, head_dim: int, dtype: torch.dtype, heads: int = 2) -> list[Tensor]:
    """query (R, H, D), key and value (T, H, D)."""
    lengths, positions = CASES[case]
    torch.manual_seed(0)
    rows = (sum(map(len, positions)), sum(lengths), sum(lengths))
    return [torch.randn(count, heads, head_dim).to(dtype) for count in rows]


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    case: str,
    causal: bool,
    dropout_p: float,
    seed: Tensor,
    normalise_last: bool = False,
    window: int | None = None,
) -> Tensor:
    """One dense product per sequence; keys behind a causal query or outside the window are masked, the rest is seen.

    normalise_last: the weights' sum divides the output, so that the gradient subtracts Σ out · dout, as kernels that
    keep no weights do: the same mathematics, rounded elsewhere.
    """
    heads, scale, outs = query.shape[1], query.shape[2] ** -0.5, []
    parts = layout(case)
    for n, positions in enumerate(CASES[case][1]):
        own = slice(int(parts["cu_seqlens_q"][n]), int(parts["cu_seqlens_q"][n + 1]))
        seen = slice(int(parts["cu_seqlens"][n]), int(parts["cu_seqlens"][n + 1]))
        q, k, v = (x.transpose(0, 1) for x in (query[own], key[seen], value[seen]))
        if not k.shape[1]:
            outs.append(query[own] * 0.0 + key.sum() * 0.0 + value.sum() * 0.0)
            continue
        at = torch.tensor(positions, dtype=torch.int64)
        scores = q @ k.transpose(1, 2) * scale
        ahead = torch.arange(k.shape[1]) - at[:, None]
        hidden = (ahead > 0) & causal
        if window is not None:
            hidden = hidden | (ahead.abs() > window)
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        weights = (scores - scores.detach().amax(-1, keepdim=True)).exp() if normalise_last else scores.softmax(-1)
        weights = weights.masked_fill(hidden, 0.0)
        total = weights.sum(-1, keepdim=True) + hidden.all(-1, keepdim=True) if normalise_last else 1.0
        if dropout_p:
            head = torch.arange(n * heads, (n + 1) * heads)[:, None]
            kept = attention_keep_mask(at, head, k.shape[1], seed, dropout_p)
            weights = torch.where(kept, weights * keep_scale(dropout_p), 0.0)
        outs.append((weights @ v / total).transpose(0, 1))
    return torch.cat(outs)
