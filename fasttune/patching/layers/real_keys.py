"""Attention of any tokens of a padded batch over the real keys of their row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fasttune import ops
from fasttune.patching.padding.layout import Layout
from fasttune.patching.padding.queries import queries_of
from fasttune.patching.promises.source import on, take_rows


def over_real_keys(
    query: Tensor, ids: Tensor, key: Tensor, value: Tensor, layout: Layout, options: Mapping[str, Any]
) -> Tensor:
    """query (R, H, D) of the tokens ids (R,) over packed real keys, (R, H, D); zeros, as from stock's attention, for
    those that see no key. options: of `ops.attention`, but for causal and window."""
    queries = queries_of(layout, ids)
    offsets = torch.cat((queries.counts.new_zeros(1), queries.counts.cumsum(0))).to(torch.int32)
    found = ops.attention(
        take_rows(query, queries.which),
        key,
        value,
        cu_seqlens_q=on(offsets, query.device),
        positions_q=on(queries.positions.to(torch.int32), query.device),
        causal=layout.causal,
        window=layout.window,
        **options,
    )
    back = torch.empty_like(queries.which)
    back[queries.which] = torch.arange(back.numel())
    return take_rows(found, back)
