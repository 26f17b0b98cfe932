"""One weight as lookup table and as head (GPT-2, BERT's masked language model): its gradient written once.

Autograd adds the two gradients of a tied weight as two dense (V, C) tensors, though a lookup touches few rows. Here the
lookup's gradient stays sparse until it meets the head's, and is then added to its rows in place. At 50257 × 768 that
saves clearing, filling and adding 154 MB (benchmarks/test_embedding.py measures it).
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _transforms
from fasttune.ops._checks import check_floating


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, probe: list[tuple[int, int, int]] | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.probe = probe
        return weight.detach(), weight.detach()

    @staticmethod
    def backward(ctx: Any, lookup: Tensor | None, head: Tensor | None) -> tuple[Tensor | None, None]:
        if head is None or lookup is None:
            alone = lookup if head is None else head
            return alone.to_dense() if alone is not None and alone.is_sparse else alone, None
        if torch.is_grad_enabled():  # a graph of the gradients: nothing in place, and plain operators
            return head + (lookup.to_dense() if lookup.is_sparse else lookup), None
        handles: int = head._use_count()  # type: ignore[attr-defined]
        holders = (handles, sys.getrefcount(head), _storage_count(head))
        if ctx.probe is not None:
            ctx.probe.append(holders)
        elif holders == _holders_of_an_unshared_gradient() and not head.is_sparse:
            if lookup.is_sparse:
                lookup = lookup.coalesce()
                return head.index_add_(0, lookup.indices()[0], lookup.values().to(head.dtype)), None
            return head.add_(lookup), None
        if lookup.is_sparse and not head.is_sparse:
            lookup = lookup.coalesce()
            return head.index_add(0, lookup.indices()[0], lookup.values().to(head.dtype)), None
        return head + lookup, None


def _storage_count(tensor: Tensor) -> int:
    if tensor.is_sparse:
        return 0
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))  # type: ignore[attr-defined]


@cache
def _holders_of_an_unshared_gradient() -> tuple[int, int, int]:
    """How many references there are to a gradient in backward that nobody else can read, counted on a small example.

    A hook that kept it, a saved tensor (retain_graph), a caller's own tensor or a view of it make it more, and then
    the gradient is not written into.
    """
    probe: list[tuple[int, int, int]] = []
    with torch.enable_grad():
        lookup, head = _Tie.apply(torch.zeros(2, 2, requires_grad=True), probe)
        (lookup * 1 + head * 1).sum().backward()
    return probe[0]


def tied_views(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(for the lookup, for the head): two aliases of weight (V, C), whose gradients meet before they reach it.

    Ask `embedding` for sparse_grad=True on the first. Any order, either one alone, several backward passes and several
    pairs at a time are right; either may be used any number of times.
    """
    check_floating("tied_views", "weight", weight)
    if _transforms.transformed() or _transforms.tracing():  # autograd adds the gradients, as it would without this
        return weight, weight
    lookup, head = _Tie.apply(weight, None)
    return lookup, head
