"""Disentangled attention, as DeBERTa has it: queries meet the keys of their distance to a token, keys the queries.

Stock hands its layers the number of the embedding that each pair of tokens goes by, (1, S, S). It is read, and taken
where it goes by the distance alone.

Shape legend: rows (R, H, D) of queries, (T, H, D) of keys; W buckets, one for each embedding that is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttune.patching.layers.frozen import Unknown
from fasttune.patching.padding.layout import for_later

_ATTRIBUTE = "_fasttune_distances"
_ALIGNED = 8  # tables of so many rows, or a multiple, are multiplied fastest


@dataclass(frozen=True)
class Cut:
    """Of a table of embeddings the rows from begin to end, and which of these each distance goes by, int32 (2 R + 1,),
    from key - query = -R to R."""

    begin: int
    end: int
    buckets: Tensor


class Distances:
    """numbers: int64 (2 S - 1,) on the CPU, by key - query from 1 - S to S - 1."""

    def __init__(self, numbers: Tensor, device: torch.device) -> None:
        self.numbers, self.device = numbers, device
        self._cuts: dict[tuple[int, int, bool, bool], Cut | None] = {}

    def cut(self, longest: int, span: int, *, c2p: bool, p2c: bool) -> Cut:
        """For sequences of so many tokens and 2 * span embeddings; raises Unknown."""
        asked = (longest, span, c2p, p2c)
        if asked not in self._cuts:
            self._cuts[asked] = self._cut(*asked)
        found = self._cuts[asked]
        if found is None:
            raise Unknown("relative positions by which queries and keys use different embeddings")
        return found

    @for_later
    def _cut(self, longest: int, span: int, c2p: bool, p2c: bool) -> Cut | None:
        middle, furthest = self.numbers.numel() // 2, max(longest, 1) - 1
        near = self.numbers[middle - furthest : middle + furthest + 1]
        of_queries = (near + span).clamp(0, 2 * span - 1)
        of_keys = (span - near.flip(0)).clamp(0, 2 * span - 1)  # which stock looks up from the key's side
        if c2p and p2c and not torch.equal(of_queries, of_keys):
            return None
        buckets = of_queries if c2p else of_keys
        begin, end = int(buckets.min()), int(buckets.max()) + 1
        width = min(-(-(end - begin) // _ALIGNED) * _ALIGNED, 2 * span)
        begin = min(begin, 2 * span - width)
        return Cut(begin, begin + width, (buckets - begin).to(torch.int32).to(self.device))


@dataclass(frozen=True)
class ByDistance:
    """What a layer is called with. table (N, E): the embeddings, which may want a gradient."""

    distances: Distances
    table: Tensor

    @staticmethod
    def of(relative_pos: Any, table: Any, length: int) -> ByDistance | None:
        """None where the pairs of length tokens do not go by their distance, or there is no table."""
        if not isinstance(relative_pos, Tensor) or not isinstance(table, Tensor) or table.dim() != 2:
            return None
        square = relative_pos.dtype == torch.int64 and relative_pos.shape[-2:] == (length, length)
        if not square or relative_pos.dim() not in (2, 3, 4) or relative_pos.numel() != length * length:
            return None
        distances = _distances(relative_pos)
        return None if distances is None else ByDistance(distances, table)


def _distances(relative_pos: Tensor) -> Distances | None:
    version = None if relative_pos.is_inference() else relative_pos._version
    known = getattr(relative_pos, _ATTRIBUTE, None)
    if known is not None and version is not None and known[0] == version:
        found: Distances | None = known[1]
        return found
    found = _read(relative_pos.detach().flatten(0, -2))
    setattr(relative_pos, _ATTRIBUTE, (version, found))
    return found


@for_later
def _read(pairs: Tensor) -> Distances | None:
    if not torch.equal(pairs[1:, 1:], pairs[:-1, :-1]):
        return None
    return Distances(torch.cat((pairs[1:, 0].flip(0), pairs[0])).cpu(), pairs.device)


class Relative:
    """pos_key, pos_query (W, H, D): what queries and keys meet, None for those that meet nothing."""

    def __init__(self, pos_key: Tensor | None, pos_query: Tensor | None, buckets: Tensor) -> None:
        self.pos_key, self.pos_query, self.buckets = pos_key, pos_query, buckets
        self.weights = tuple(table for table in (pos_key, pos_query) if table is not None)

    def __call__(self, query: Tensor, key: Tensor) -> dict[str, Any]:
        """Of `ops.attention`."""
        of_queries, of_keys = _product(query, self.pos_key), _product(key, self.pos_query)
        return {"c2p": of_queries, "p2c": of_keys, "buckets": self.buckets}


def _product(rows: Tensor, table: Tensor | None) -> Tensor | None:
    """(R, H, W)"""
    return None if table is None else torch.bmm(rows.transpose(0, 1), table.permute(1, 2, 0)).transpose(0, 1)
