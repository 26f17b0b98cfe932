"""Tokens of a padded batch, those at padding too, as queries over the real keys of their row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fasttune.patching.padding.layout import Layout


@dataclass(frozen=True)
class Queries:
    """Tokens that attend in one call: which (R,) of the numbers asked for they are, in the order of their sequences and
    positions; positions (R,); counts (B,), how many each sequence has. causal, window: of the call. All on the CPU."""

    which: Tensor
    positions: Tensor
    counts: Tensor
    causal: bool
    window: int | None


def queries_of(layout: Layout, ids: Tensor) -> list[Queries]:
    """The tokens ids (R,) of a layout with padding, without those that see no key at all.

    A token at padding has no position among the real ones. It gets one from which it sees the keys that stock's mask
    shows it: behind the last key its own column, between keys that of the last one that it sees. Under a window it
    stands as far from the first key as its column does; before that key it sees the first few, as a causal query would
    that is a window further on.
    """
    length = layout.shape[1]
    real = layout.places.index_select(0, ids) >= 0
    sequence, column = ids // length, ids % length
    lengths = layout.lengths.index_select(0, sequence)
    if layout.window is None:
        seen = layout.seen.index_select(0, ids)
        behind = torch.where(seen == lengths, torch.maximum(column, seen), seen - 1)
        places = layout.places.index_select(0, ids) - (layout.lengths.cumsum(0) - layout.lengths)[sequence]
        positions = torch.where(real, places, behind)
        return [_queries(layout, sequence, positions, real | (seen > 0), layout.causal, None)]
    positions = column - layout.begins.index_select(0, sequence)
    groups = [(positions, (positions >= 0) & (positions - layout.window < lengths), layout.causal, layout.window)]
    before = (positions < 0) & (positions >= -layout.window) & (lengths > 0)
    if not layout.causal and bool(before.any()):
        groups.append((positions + layout.window, before, True, None))  # type: ignore[arg-type]
    return [_queries(layout, sequence, *group) for group in groups]


def _queries(
    layout: Layout, sequence: Tensor, positions: Tensor, looking: Tensor, causal: bool, window: int | None
) -> Queries:
    order = (sequence * (4 * layout.shape[1]) + positions).argsort(stable=True)
    order = order[looking[order]]
    counts = torch.bincount(sequence[order], minlength=layout.shape[0])
    return Queries(order, positions[order], counts, causal, window)
