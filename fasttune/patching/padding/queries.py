"""Tokens of a padded batch, those at padding too, as queries over the real keys of their row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fasttune.patching.padding.layout import Layout


@dataclass(frozen=True)
class Queries:
    """Tokens that attend: which (R,) of the numbers asked for they are, in the order of their sequences and positions;
    positions (R,); counts (B,), how many each sequence has. All on the CPU."""

    which: Tensor
    positions: Tensor
    counts: Tensor


def queries_of(layout: Layout, ids: Tensor) -> Queries:
    """The tokens ids (R,) of a layout with padding.

    Where the real tokens of each row stand side by side, a token is as far from the first of them as its column is: in
    front of it at a negative position, behind the last one at padding on the right. Elsewhere a token at padding has
    no such place, only keys that stock's mask shows it: it gets the position of the last one that it sees, -1 if it
    sees none, its own column if it sees all.
    """
    length = layout.shape[1]
    sequence, column = ids // length, ids % length
    if layout.side_by_side:
        positions = column - layout.begins.index_select(0, sequence)
    else:
        lengths, seen = layout.lengths.index_select(0, sequence), layout.seen.index_select(0, ids)
        behind = torch.where(seen == lengths, torch.maximum(column, seen), seen - 1)
        places = layout.places.index_select(0, ids)
        firsts = (layout.lengths.cumsum(0) - layout.lengths).index_select(0, sequence)
        positions = torch.where(places >= 0, places - firsts, behind)
    which = (sequence * (4 * length) + positions).argsort(stable=True)
    counts = torch.bincount(sequence, minlength=layout.shape[0])
    return Queries(which, positions[which], counts)
