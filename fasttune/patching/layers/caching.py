"""Keys and values of a promised layer, for a cache that is empty: computed when somebody looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fasttune.patching.layers.attention import into_cache
from fasttune.patching.layers.layer_rows import LayerRows
from fasttune.patching.promises.later import Later


@dataclass(eq=False)
class _Cached:
    """Keys (part 0) or values (part 1) of every token (B, H, S, D)."""

    source: LayerRows
    part: int

    def __call__(self) -> Tensor:
        source = self.source
        keys_and_values = source.keys_and_values_of_all()
        return keys_and_values[self.part].unflatten(0, source.layout.shape).transpose(1, 2)


def fill(cache: Any, layer_idx: int, promised: Any, heads: int, head_dim: int) -> None:
    """Hands the cache what stock would have put into it."""
    source: LayerRows = promised.state.source
    shape = (source.layout.shape[0], heads, source.layout.shape[1], head_dim)
    key, value = (Later.of(_Cached(source, part), shape, source.dtype, source.device) for part in (0, 1))
    into_cache(cache, key, value, layer_idx)
