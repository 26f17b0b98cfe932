"""Replacement classes for torch's own modules. Each keeps its stock class's name and forward, and computes with
fasttune.ops where that is possible for the call at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasttune import ops
from fasttune.patching.layers.entry import source_of
from fasttune.patching.layers.patched import Patched
from fasttune.patching.marks import unusual
from fasttune.patching.premises.known import is_sharded, why_watched
from fasttune.patching.promises.loss import LinearRows
from fasttune.patching.promises.reads import dropped
from fasttune.patching.promises.tensor import PromisedRows, materialized


class LayerNorm(Patched, nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, PromisedRows):
            if not input.untouched() or not self._fasttune.fused(input):
                return nn.LayerNorm.forward(self, input)
            weight, bias, eps, backend = self.weight, self.bias, self.eps, self._fasttune.backend
            self._fasttune.note()
            return input.mapped(
                lambda rows, ids: ops.layer_norm(rows, weight, bias, eps=eps, backend=backend), (weight, bias)
            )
        if not self._fasttune.fused(input):
            return nn.LayerNorm.forward(self, input)
        self._fasttune.note()
        return ops.layer_norm(input, self.weight, self.bias, eps=self.eps, backend=self._fasttune.backend)


class Dropout(Patched, nn.Dropout):
    """By fasttune's generator, which goes by the numbers of rows, whichever rows are there."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0.0 or self.inplace:
            return nn.Dropout.forward(self, input)
        if input.dim() == 0 or not input.is_floating_point() or not self._fasttune.fused(input):
            return nn.Dropout.forward(self, input)
        self._fasttune.note()
        if isinstance(input, PromisedRows) and input.untouched() and input.state.everything:
            return dropped(input, self.p, self._fasttune.backend)
        return ops.dropout(materialized(input), dropout_p=self.p, backend=self._fasttune.backend)


class Embedding(Patched, nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        if not self._fasttune.fused(self.weight):
            return nn.Embedding.forward(self, input)
        self._fasttune.note()
        return ops.embedding(input, self.weight, padding_idx=self.padding_idx, backend=self._fasttune.backend)


class Linear(Patched, nn.Linear):
    """A vocabulary projection that returns logits nobody has computed yet, for the loss to go without them."""

    def forward(self, input: Tensor) -> Tensor:
        why = self._why_at_once(input)
        if why is not None:
            if why:
                self._fasttune.aside(why)
            return nn.Linear.forward(self, input)
        return logits_on_demand(self, input, self.weight, self.bias)

    def plus(self, input: Tensor, bias: Tensor) -> Tensor:
        """self(input) + bias, of a head that keeps its bias beside the projection."""
        if self.bias is not None or why_watched(self) is not None or self._why_at_once(input) is not None:
            out: Tensor = self(input) + bias
            return out
        return logits_on_demand(self, input, self.weight, bias)

    def _why_at_once(self, input: Tensor) -> str | None:
        return "" if type(self) is not Linear else why_at_once(self, input, self.weight)


def logits_on_demand(head: Patched, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input @ weightᵀ + bias of a projection to the vocabulary, which nobody has computed yet."""
    fresh = isinstance(input, PromisedRows) and input.untouched()
    source = input.state.source if fresh else source_of(input)  # type: ignore[attr-defined]
    weight = source.head_weight(weight)
    patch = head._fasttune
    select = bool(patch.settings.options.trim)
    logits = LinearRows(source, weight, bias, patch.backend, select=select, note=patch.note)
    if isinstance(input, PromisedRows) and source is input.state.source:
        return input.with_source(logits)
    return PromisedRows.of(logits, input.shape[:-1])


def why_at_once(head: Patched, input: Tensor, weight: Tensor) -> str | None:
    """None in training with gradients, where weight and input are ordinary tensors that will still be there when the
    logits are read; "" in the ordinary run of things, else a reason to report."""
    if not head.training or torch.compiler.is_compiling() or not torch.is_grad_enabled() or unusual():
        return ""
    if type(weight) is not nn.Parameter or input.dim() < 2:
        return ""
    if not (input.requires_grad or weight.requires_grad) or input.device.type == "meta":
        return ""
    if head._backward_hooks or head._backward_pre_hooks:
        return "backward hooks on the head"
    if is_sharded(head) or head._fasttune.settings.sharded():
        return "its weights are sharded and may be gone when rows are read"
    ddp = nn.parallel.DistributedDataParallel._active_ddp_module
    if ddp is not None and (ddp.find_unused_parameters or ddp.static_graph):
        return "DDP follows the graph of its outputs (find_unused_parameters or static_graph)"
    if isinstance(input, PromisedRows) and input.untouched() and input.dtype != input.state.source.dtype:
        return ""
    return None


DROPOUTS = (nn.Dropout, Dropout)
LAYER_NORMS = (nn.LayerNorm, LayerNorm)


def why_no_layer_norm(module: Any) -> str | None:
    """Why `ops.layer_norm` cannot stand in for this LayerNorm."""
    if not isinstance(module, nn.LayerNorm):
        return f"its LayerNorm is a {type(module).__module__}.{type(module).__name__}"
    return None if len(module.normalized_shape) == 1 else "it normalises more than one dimension"


def why_no_norm_of_embeddings(module: Any) -> str | None:
    """Why `ops.embedding` cannot end in this LayerNorm."""
    why = why_no_layer_norm(module)
    if why is None and module.weight is None and module.bias is None:
        return "its LayerNorm has neither weight nor bias"
    return why


def why_no_embedding(module: Any) -> str | None:
    """Why `ops.embedding` cannot stand in for this Embedding."""
    if not isinstance(module, nn.Embedding):
        return f"its Embedding is a {type(module).__module__}.{type(module).__name__}"
    if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        return "it uses max_norm, sparse or scale_grad_by_freq"
    return None


def dropout_probability(module: Any) -> float:
    return float(module.p) if module.training else 0.0
