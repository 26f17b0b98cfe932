"""Sums of embedding rows in torch operators."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def embedding_sum(
    word_ids: Tensor,
    word_weight: Tensor,
    type_ids: Tensor | None,
    type_weight: Tensor | None,
    position_ids: Tensor | None,
    position_weight: Tensor | None,
    padding_idx: int | None,
    sparse: bool,
) -> Tensor:
    """word[word_ids] + token_type[type_ids] + position[position_ids], (..., C)."""
    out = F.embedding(word_ids, word_weight, padding_idx=padding_idx, sparse=sparse)
    if type_weight is not None:
        assert type_ids is not None
        out = out + F.embedding(type_ids, type_weight)
    if position_weight is not None:
        assert position_ids is not None
        out = out + F.embedding(position_ids, position_weight)
    return out
