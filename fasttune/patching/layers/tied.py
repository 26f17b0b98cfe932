"""The two aliases of a tied weight: the lookup takes one, the vocabulary projection the other, and the gradient of the
weight is written once (fasttune.ops.tied).

The lookup hands the head's alias on with its result, and promised rows carry it along. Who finds none, because other
code stood in between, multiplies by the weight itself: as right, only slower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasttune.ops.tied import tied_views
from fasttune.patching.marks import reading_waits


def lookup_view(table: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """(weight, alias to look up with sparse_grad=True, alias for the head) of an embedding whose weight a head of the
    same model shares; None where it does not, or where the weight is no plain leaf (sharded, functional)."""
    weight = table.weight
    if not table._fasttune.tied or torch.compiler.is_compiling() or not torch.is_grad_enabled() or not table.training:
        return None
    if type(weight) is not nn.Parameter or not weight.requires_grad or weight.dtype == torch.float16:
        return None  # torch cannot add two sparse gradients in float16
    if reading_waits(weight.device):  # the host would wait for the number of rows that a sparse gradient holds
        return None
    lookup, head = tied_views(weight)
    return weight, lookup, head
