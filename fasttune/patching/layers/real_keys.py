"""Attention of any tokens of a padded batch over the real keys of their row, or of those at padding over all alike."""

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


def over_all_columns(
    ids: Tensor, value: Tensor, at_padding: Tensor, layout: Layout, options: Mapping[str, Any]
) -> Tensor:
    """The tokens at padding ids (R,) weigh all columns of their row alike: (R, H, D), of value (T, H, D) of the real
    tokens and at_padding (P, H, D) of all others in these rows. Dropout knows such a query behind the last column,
    where no real one is. options: of `ops.attention`."""
    rows, length = layout.shape
    padding, columns = layout.row_mates(ids, real=False), layout.row_mates(ids, real=True)
    places = layout.places.index_select(0, columns)
    places[places < 0] = value.shape[0] + torch.arange(padding.numel())
    value = take_rows(torch.cat((value, at_padding)), places)
    queries, keys = (torch.bincount(of // length, minlength=rows) for of in (ids, columns))
    offsets_q, offsets = (
        on(torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32), value.device)
        for counts in (queries, keys)
    )
    return ops.attention(
        value.new_zeros(ids.numel(), *value.shape[1:]),
        torch.zeros_like(value),
        value,
        scale=1.0,
        dropout_p=options["dropout_p"],
        cu_seqlens=offsets,
        max_seqlen=length,
        cu_seqlens_q=offsets_q,
        positions_q=on((length + ids % length).to(torch.int32), value.device),
        backend=options["backend"],
    )
