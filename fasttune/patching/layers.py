"""Replacement classes for torch's own modules. Each keeps its stock class's name and forward, and computes with
fasttune.ops where that is possible for the call at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fasttune import ops
from fasttune.patching.lazy_rows import LazyRows, LinearRows, MappedRows, RowSource, TensorRows
from fasttune.patching.plain import is_sharded
from fasttune.patching.rows import labels_given
from fasttune.patching.spec import Replacement
from fasttune.patching.state import ModulePatch
from fasttune.patching.tied import head_view, lookup_view


class Patched(nn.Module):
    """Base of every replacement: `module._fasttune` says how it was patched."""

    _fasttune: ModulePatch

    if TYPE_CHECKING:  # the submodules of the stock class

        def __getattr__(self, name: str) -> Any: ...


class LayerNorm(Patched, nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, LazyRows) and not input.computed():
            return mapped(input, self, LayerNorm.forward, self.normalized_shape[0])
        if isinstance(input, LazyRows) or not self._fasttune.fused(input):
            return nn.LayerNorm.forward(self, input)
        return ops.layer_norm(input, self.weight, self.bias, eps=self.eps, backend=self._fasttune.backend)


class Dropout(Patched, nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0.0 or not self._fasttune.fused(input):
            return nn.Dropout.forward(self, input)
        if isinstance(input, LazyRows):
            input = input.materialize()
        return ops.dropout(input, dropout_p=self.p, backend=self._fasttune.backend)


class Embedding(Patched, nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        if not self._fasttune.fused(self.weight):
            return nn.Embedding.forward(self, input)
        tied = lookup_view(self)
        return ops.embedding(
            input,
            self.weight if tied is None else tied,
            padding_idx=self.padding_idx,
            sparse_grad=tied is not None,
            backend=self._fasttune.backend,
        )


class Linear(Patched, nn.Linear):
    """A vocabulary projection that returns logits nobody has computed yet, for the loss to go without them."""

    def forward(self, input: Tensor) -> Tensor:
        if not self._defers(input):
            return nn.Linear.forward(self, input)
        source: RowSource = input.source if isinstance(input, LazyRows) else TensorRows(input)
        logits = LinearRows(source, head_view(self.weight), self.bias)
        logits.note = self._fasttune.aside
        logits.backend = self._fasttune.backend
        logits.select = source.select = source.select and self._fasttune.selects_rows
        return input.with_source(logits) if isinstance(input, LazyRows) else LazyRows.of(logits, input.shape[:-1])

    def _defers(self, input: Tensor) -> bool:
        """In training with gradients, where weight and input are ordinary tensors that will still be there when the
        logits are read; evaluation, torch.compile, functional calls, sharded weights and backward hooks, which want
        the logits' gradient, get logits at once."""
        return (
            type(self) is Linear
            and type(self.weight) is nn.Parameter
            and (input.requires_grad or self.weight.requires_grad)
            and may_defer(self)
        )


def may_defer(module: Patched) -> bool:
    """Whether a module of a head may return rows that nobody has computed yet."""
    may = (
        module.training
        and not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not any(m._backward_hooks or m._backward_pre_hooks for m in (module, *module._fasttune.within))
    )
    why = _why_at_once(module) if may else None
    if why is not None:
        module._fasttune.aside(why)
    return may and why is None


def _why_at_once(module: Patched) -> str | None:
    """What data parallelism has against rows that do not exist yet."""
    if any(is_sharded(m) for m in (module, *module._fasttune.within)):
        return "its weights are sharded and may be gone when rows are read"
    ddp = nn.parallel.DistributedDataParallel._active_ddp_module
    if ddp is not None and (ddp.find_unused_parameters or ddp.static_graph) and not labels_given():
        return "DDP follows the graph of its outputs (find_unused_parameters or static_graph) and no labels came"
    return None


def mapped(lazy: LazyRows, module: nn.Module, function: Callable[[Any, Tensor], Tensor], features: int) -> LazyRows:
    """function(module, rows) of lazy rows, as lazy rows."""
    dtype = lazy.source.dtype
    if torch.is_autocast_enabled(lazy.device.type):  # autocast decides: ask it
        with torch.no_grad():
            dtype = function(module, torch.empty(0, lazy.shape[-1], dtype=dtype, device=lazy.device)).dtype
    return lazy.with_source(MappedRows(lazy.source, module, function, features, dtype))


LAYER_NORMS = (nn.LayerNorm, LayerNorm)
DROPOUTS = (nn.Dropout, Dropout)


def why_no_layer_norm(module: Any) -> str | None:
    """Why `ops.layer_norm` cannot stand in for this LayerNorm."""
    if not isinstance(module, nn.LayerNorm):
        return f"its LayerNorm is a {type(module).__module__}.{type(module).__name__}"
    if module.weight is None or module.bias is None or len(module.normalized_shape) != 1:
        return "it has no weight and bias over one dimension"
    return None


def why_no_embedding(module: Any) -> str | None:
    """Why `ops.embedding` cannot stand in for this Embedding."""
    if not isinstance(module, nn.Embedding):
        return f"its Embedding is a {type(module).__module__}.{type(module).__name__}"
    if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        return "it uses max_norm, sparse or scale_grad_by_freq"
    return None


def dropout_probability(module: Any) -> float:
    return float(module.p) if module.training else 0.0


def common_leaves(*heads: str) -> tuple[Replacement, ...]:
    """torch's own modules, wherever a family holds them. heads: the names of projections of which few rows are read."""
    return (
        Replacement(
            nn.Linear,
            Linear,
            "loss",
            "linear_cross_entropy",
            "logits on demand, loss without them",
            only=heads,
            pays_in_torch=True,
        ),
        Replacement(nn.LayerNorm, LayerNorm, "norms", "layer_norm", "LayerNorm", unsuited=why_no_layer_norm),
    )
