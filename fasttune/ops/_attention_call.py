"""What is asked of attention: which queries meet which keys, and what becomes of their scores.

A call is described once, by the fields of `Call`, and every part reads the description: the operator's schema is made
of the fields, the context keeps them, the kernels' launchers and the composition of torch operators take them.

Shape legend: as in fasttune/ops/attention.py.
"""

from __future__ import annotations

from typing import NamedTuple, get_type_hints

from torch import Tensor


class Call(NamedTuple):
    """Layout: dense without cu_seqlens; packed with cu_seqlens (N + 1,), of whose longest sequence max_seqlen is the
    length, if known; queries of some positions only with cu_seqlens_q (N + 1,) and positions_q (R,) besides.

    Variant: seed (1,) of the dropout, None without; causal: a query sees the keys up to its own position; scale: of the
    scores; dropout_p: of the weights; window: of the keys up to so far from its position, None for any, below 2 ** 30.

    Terms of the scores: bias (H, 2 R + 1), float32 (float64 where query is), by the distance of key and query; c2p like
    query and p2c like key with W buckets for D, and int32 buckets (2 R + 1,), which of them a distance has.
    """

    cu_seqlens: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    positions_q: Tensor | None = None
    max_seqlen: int | None = None
    seed: Tensor | None = None
    causal: bool = False
    scale: float = 1.0
    dropout_p: float = 0.0
    window: int | None = None
    bias: Tensor | None = None
    c2p: Tensor | None = None
    p2c: Tensor | None = None
    buckets: Tensor | None = None

    def sizes(self, query: Tensor, key: Tensor) -> tuple[int, int, int, int, int]:
        """Sequences, and of each, or packed of all: queries, keys; heads, head dimension."""
        heads, head_dim = query.shape[-2:]
        if self.cu_seqlens is None:
            return query.shape[0], query.shape[1], key.shape[1], heads, head_dim
        return self.cu_seqlens.shape[0] - 1, query.shape[0], key.shape[0], heads, head_dim


_KINDS = {Tensor | None: "Tensor?", int | None: "int?", bool: "bool", float: "float"}
_HINTS = {name: get_type_hints(Call)[name] for name in Call._fields}
SCHEMA = ", ".join(f"{_KINDS[hint]} {name}" for name, hint in _HINTS.items())
TENSORS = tuple(place for place, hint in enumerate(_HINTS.values()) if hint == Tensor | None)
LEARNED = tuple(Call._fields.index(name) for name in ("bias", "c2p", "p2c"))  # which have gradients


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rows(x: Tensor | None) -> tuple[int, ...]:
    """Address and strides of sequence, row and head of (B, S, H, D) or (T, H, D); zeros for None."""
    if x is None:
        return (0, 0, 0, 0)
    strides = x.stride()
    return (x.data_ptr(), *strides[:3]) if len(strides) == 4 else (x.data_ptr(), 0, *strides[:2])
