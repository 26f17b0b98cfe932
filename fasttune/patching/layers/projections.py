"""From a captured layer's rows to its queries, keys and values: by three linear layers or by one, turned by their
positions or not.

Shape legend: rows (R, E), row_ids (R,) their numbers in the padded batch; query, key, value (R, H, D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttune import ops
from fasttune.patching.layers.frozen import Adapted, Linear, Unknown, linear

# query (R, H, D), key (T, H, D) -> those options of `ops.attention` that go by them.
Terms = Callable[[Tensor, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Rotary:
    """cos, sin (1 or B, S, W) of a call: of the tokens of one row, the same for all, or of all tokens."""

    cos: Tensor
    sin: Tensor

    def __post_init__(self) -> None:
        if self.cos.dim() != 3 or self.sin.shape != self.cos.shape:
            raise Unknown("position embeddings of another shape")
        if self.cos.requires_grad or self.sin.requires_grad:
            raise Unknown("position embeddings that require a gradient")

    @staticmethod
    def fits(position_embeddings: Any, hidden: Tensor, head_dim: int) -> bool:
        """Whether these are cos and sin of whole heads, for the tokens of hidden (B, S, E)."""
        if not isinstance(position_embeddings, tuple) or len(position_embeddings) != 2:
            return False
        shapes = [(rows, hidden.shape[1], head_dim) for rows in (1, hidden.shape[0])]
        dtypes = (hidden.dtype, torch.float32)
        return all(isinstance(x, Tensor) and x.shape in shapes and x.dtype in dtypes for x in position_embeddings)

    def of_batch(self, x: Tensor, rotated: int | None, backend: str | None) -> Tensor:
        """x (B, S, ..., D) of every token."""
        return ops.rotary(x, self.cos.flatten(0, 1), self.sin.flatten(0, 1), rotated=rotated, backend=backend)

    def __call__(self, x: Tensor, row_ids: Tensor, rotated: int | None, backend: str | None) -> Tensor:
        of_one_row = self.cos.shape[0] == 1
        ids = row_ids % self.cos.shape[1] if of_one_row else row_ids
        cos, sin = self.cos.flatten(0, 1), self.sin.flatten(0, 1)
        return ops.rotary(x, cos, sin, row_ids=ids, rotated=rotated, backend=backend)


class Separate:
    """One linear layer for each of query, key and value."""

    def __init__(self, query: Any, key: Any, value: Any, head_dim: int, rotary: Rotary | None = None) -> None:
        self.query, self.key, self.value = linear(query), linear(key), linear(value)
        self.head_dim, self.rotary = head_dim, rotary
        self.weights = [*self.query.weights, *self.key.weights, *self.value.weights]

    def attend(
        self, rows: Tensor, row_ids: Tensor, options: dict[str, Any], terms: Terms
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(attended (R, H, D), what backward keeps of keys and values)."""
        key, value = self.keys_and_values(rows, row_ids, options["backend"])
        query = self.queries(rows, row_ids, options["backend"])
        return ops.attention(query, key, value, **options, **terms(query, key)), (key, value)

    def kept(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return tensors[0], tensors[1]

    def keys_and_values(self, rows: Tensor, row_ids: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
        return self._of(self.key, rows, row_ids, backend), self.values(rows, row_ids)

    def values(self, rows: Tensor, row_ids: Tensor) -> Tensor:
        return self._of(self.value, rows, row_ids, None, turned=False)

    def queries(self, rows: Tensor, row_ids: Tensor, backend: str | None) -> Tensor:
        return self._of(self.query, rows, row_ids, backend)

    def _of(
        self, by: Linear | Adapted, rows: Tensor, row_ids: Tensor, backend: str | None, *, turned: bool = True
    ) -> Tensor:
        out = by(rows, row_ids).unflatten(-1, (-1, self.head_dim))
        return out if self.rotary is None or not turned else self.rotary(out, row_ids, None, backend)


class Fused:
    """One linear layer whose output is query, key and value, one after the other; their gradient is written once."""

    def __init__(self, qkv: Any, heads: int, head_dim: int, rotary: Rotary | None = None) -> None:
        self.qkv, self.heads, self.head_dim, self.rotary = linear(qkv), heads, head_dim, rotary
        self.width = heads * head_dim
        self.weights = list(self.qkv.weights)

    def attend(
        self, rows: Tensor, row_ids: Tensor, options: dict[str, Any], terms: Terms
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        qkv = self.qkv(rows, row_ids).unflatten(-1, (3, self.heads, self.head_dim))
        if self.rotary is not None:
            qkv = self.rotary(qkv, row_ids, 2, options["backend"])
        return ops.attention_packed_qkv(qkv, **options, **terms(qkv[:, 0], qkv[:, 1])), (qkv,)

    def kept(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        if len(tensors) == 1:
            return tensors[0][:, 1], tensors[0][:, 2]
        return tensors[0], tensors[1]

    def keys_and_values(self, rows: Tensor, row_ids: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
        """A query's product, which can wait, is left out."""
        both = self.qkv.part(rows, row_ids, self.width, 3 * self.width)
        key, value = both.unflatten(-1, (2, self.heads, self.head_dim)).unbind(1)
        return key if self.rotary is None else self.rotary(key, row_ids, None, backend), value

    def values(self, rows: Tensor, row_ids: Tensor) -> Tensor:
        return self.qkv.part(rows, row_ids, 2 * self.width, 3 * self.width).unflatten(-1, (self.heads, self.head_dim))

    def queries(self, rows: Tensor, row_ids: Tensor, backend: str | None) -> Tensor:
        query = self.qkv.part(rows, row_ids, 0, self.width).unflatten(-1, (self.heads, self.head_dim))
        return query if self.rotary is None else self.rotary(query, row_ids, None, backend)
