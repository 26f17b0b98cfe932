"""The two aliases of a tied weight in the running call: the lookup takes one, the vocabulary projection the other, and
the weight's gradient is written once (fasttune.ops.tied)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fasttune.ops.tied import tied_views
from fasttune.patching import rows
from fasttune.patching.state import reading_waits


def lookup_view(table: nn.Module) -> Tensor | None:
    """The alias of an embedding's weight to look up with sparse_grad=True, where the running model's head is tied to it
    and will take the other; else None. Parameters that are no plain leaves (sharded, functional) are left alone."""
    from fasttune.patching.layers import Linear

    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    call, weight = rows.running_call(), table.weight
    if call is None or type(weight) is not nn.Parameter or not weight.requires_grad:
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    if reading_waits(weight.device):  # for the number of rows that a sparse gradient holds
        return None
    if call.tied is None:
        output = getattr(call.model, "get_output_embeddings", lambda: None)()
        if type(output) is not Linear or output.weight is not weight or not output.training:
            return None
        call.tied = (weight, *tied_views(weight))
    elif weight.dtype == torch.float16:
        return None  # torch cannot add two sparse gradients in float16: the second lookup takes the weight itself
    return call.tied[1] if call.tied[0] is weight else None


def head_view(weight: Tensor) -> Tensor:
    """What the vocabulary projection multiplies by: the weight itself, unless the lookup left an alias for it."""
    call = None if torch.compiler.is_compiling() else rows.running_call()
    return call.tied[2] if call is not None and call.tied is not None and call.tied[0] is weight else weight
