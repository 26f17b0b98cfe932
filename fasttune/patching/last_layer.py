"""The last layer's rows, computed when somebody reads them: keys and values for all rows, the rest for those alone.

A classifier reads one row per sequence, a language-model loss the labelled ones. So the last layer of a stack returns a
`LazyRows`. Keys and values, and what they need, are computed at once; queries, the output projection, the residuals and
the MLP for the rows that are asked for, as often as other rows are. Dropout of a row does not depend on which rows are
asked for together with it: seeds are drawn once, and rows keep the numbers they have in the padded batch.

Shape legend: hidden states (T, E) of the real tokens, T = B * S without padding; rows asked for: R.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import _active_collector

from fasttune import ops
from fasttune.ops._backends import why_not
from fasttune.ops._random import repeating
from fasttune.ops.packing import PackedBatch
from fasttune.patching.facts import facts_of_call
from fasttune.patching.lazy_rows import LazyRows, RowSource, take_rows
from fasttune.patching.plain import is_sharded
from fasttune.patching.plan import Plan
from fasttune.patching.rows import may_trim, note_on_running_call, running_call
from fasttune.patching.stack import is_last, rows_numbered, why_hooked
from fasttune.patching.state import environment_backend, patch_of, reading_waits, runs_fused

WORTH_IT = 0.75  # of the real rows: above it, trimming saves less than picking rows costs


class Chosen:
    """The rows asked for: places int64 (R,) among the T packed rows, rising; on a device that is not waited for some
    may stand twice. everything: places is 0, 1, ..., T - 1."""

    def __init__(self, packed: PackedBatch, places: Tensor, everything: bool) -> None:
        offsets = packed.cu_seqlens.long()
        sequence = torch.bucketize(places, offsets[1:], right=True)
        self.places, self.everything = places, everything
        self.row_ids = packed.indices if everything else packed.indices.index_select(0, places)
        self.cu_seqlens_q = torch.searchsorted(places, offsets).to(torch.int32)
        self.positions_q = (places - offsets.index_select(0, sequence)).to(torch.int32)
        self.cu_seqlens, self.max_seqlen = packed.cu_seqlens, packed.max_seqlen

    def of(self, x: Tensor) -> Tensor:
        """The chosen rows of x (T, ...)."""
        return x if self.everything else take_rows(x, self.places)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """query (R, H, D), key and value (T, H, D) -> (R, H * D)."""
        if self.everything:
            out = ops.attention(query, key, value, cu_seqlens=self.cu_seqlens, max_seqlen=self.max_seqlen, **options)
        else:
            out = ops.attention(
                query,
                key,
                value,
                cu_seqlens=self.cu_seqlens,
                max_seqlen=self.max_seqlen,
                cu_seqlens_q=self.cu_seqlens_q,
                positions_q=self.positions_q,
                **options,
            )
        return out.flatten(1)


class LastLayerRows(RowSource):
    """layer.rows_of(chosen, hidden (T, E), prepared) on request, where prepared = layer.prepare(hidden)."""

    def __init__(self, layer: Any, hidden: Tensor, packed: PackedBatch, prepared: Any) -> None:
        self.layer, self.hidden, self.packed, self.prepared = layer, hidden, packed, prepared
        self.seeds: list[Tensor] = []
        self.features, self.dtype, self.device = hidden.shape[-1], hidden.dtype, hidden.device
        super().__init__(layer.parameters())
        if torch.is_autocast_enabled(self.device.type):
            with torch.no_grad():
                self.dtype = self._compute(packed.indices[:0], everything=False).dtype
            self.seeds = []

    def _rows(self, ids: Tensor | None) -> Tensor:
        if ids is None:
            tokens = torch.arange(self.packed.total, device=self.device)
            everything = self._compute(tokens, everything=True)
            return everything if self.packed.is_full else ops.unpack(everything, self.packed).flatten(0, 1)
        if self.packed.is_full:
            return self._compute(ids, everything=False)
        places = self.packed.packed_rows.index_select(0, ids)
        inside = places >= 0
        if reading_waits(self.device) and self.packed.total > 0:  # in place of padding the row before, which is dropped
            computed = self._compute(places.cummax(0).values.clamp(min=0), everything=False)
            return torch.where(inside[:, None], computed, 0)
        real = inside.nonzero().squeeze(1)
        if real.numel() == places.numel():
            return self._compute(places, everything=False)
        computed = self._compute(places.index_select(0, real), everything=False)
        return computed.new_zeros(ids.numel(), self.features).index_copy(0, real, computed)  # zeros at padding

    def _compute(self, places: Tensor, *, everything: bool) -> Tensor:
        chosen = Chosen(self.packed, places, everything)
        rows = chosen.of(self.hidden)
        with repeating(self.seeds), rows_numbered(chosen.row_ids):
            result: Tensor = self.layer.rows_of(chosen, rows, self.prepared)
            return result


def on_demand(layer: Any, hidden: Tensor, plan: Plan | None, shape: tuple[int, int], cache: Any) -> LazyRows | None:
    """The last layer's output as rows to be computed, or None where it has to be computed now.

    hidden: (1, T, E) if the plan is across, else (B, S, E) without padding. shape: (B, S). cache: what to update.
    """
    if torch.compiler.is_compiling() or not is_last(layer):
        return None
    call = running_call()
    if call is None or not patch_of(call.model).settings.options.trim or not may_trim(call):
        return None
    why = _why_not(layer, hidden, plan, shape)
    if why is not None:
        if why:
            note_on_running_call("trim", why)
        return None
    if plan is None:
        packed = _unpadded(shape, hidden.device)
        causal = layer.causal
    else:
        packed, causal = plan.packed, layer.causal if plan.causal is None else plan.causal
    flat = hidden.flatten(0, 1)
    return LazyRows.of(LastLayerRows(layer, flat, packed, layer.prepare(flat, packed, causal, cache)), shape)


def _unpadded(shape: tuple[int, int], device: torch.device) -> PackedBatch:
    rows, length = shape
    offsets = torch.arange(rows + 1, dtype=torch.int32, device=device) * length
    return PackedBatch(torch.arange(rows * length, device=device), offsets, length, shape)


def _why_not(layer: Any, hidden: Tensor, plan: Plan | None, shape: tuple[int, int]) -> str | None:
    """None if the last layer can wait for readers, "" if there is nothing to gain, else a reason to report."""
    call = running_call()
    assert call is not None
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    requested = layer._fasttune.backend or environment_backend() or "auto"
    why = None if requested == "auto" else why_not("attention_chosen_queries", requested, kind, dtype)
    if why is not None:
        return why
    if not runs_fused("attention_chosen_queries", kind, dtype, layer._fasttune.backend):
        return f"no fused attention of chosen queries for {str(dtype).removeprefix('torch.')} on {kind}"
    if plan is not None and not plan.across and not plan.packed.is_full:
        return "padding stays between layers"
    facts = facts_of_call(call, shape, hidden.device)
    if facts.read is None or facts.read > WORTH_IT * facts.real:
        return ""
    if _active_collector.get():
        return "hidden states or attentions were asked for"
    # A reentrant checkpoint runs the layer without gradients first: rows that were promised there would have none.
    if layer.training and (layer.gradient_checkpointing or not torch.is_grad_enabled()):
        return "gradient checkpointing, or training without gradients"
    if torch.is_inference_mode_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return "inference mode or a functional transform"
    sharded = any(is_sharded(module) for module in call.model.modules())
    if sharded or any(type(p) is not nn.Parameter for p in layer.parameters()):
        return "sharded parameters"
    return layer.why_not_trimmed() or why_hooked(layer, ("transformers.utils.output_capturing",)) or _why_around(layer)


def _why_around(layer: nn.Module) -> str | None:
    """Modules between the model and its last layer that are watched, or anything whose backward is."""
    call = running_call()
    assert call is not None
    for module in call.model.modules():
        if module._backward_hooks or module._backward_pre_hooks:
            return f"backward hooks on {type(module).__name__}"
        watched = module._forward_hooks or module._forward_pre_hooks
        inside = module is call.model or module is layer
        if watched and not inside and any(child is layer for child in module.modules()):
            return f"hooks on {type(module).__name__}"
    return None


def other_dropout(layer: nn.Module, known: tuple[nn.Module, ...]) -> str | None:
    """A dropout that would draw anew at each reading (of an adapter, say)."""
    for module in layer.modules():
        if isinstance(module, nn.Dropout) and module.training and module.p > 0 and all(module is not k for k in known):
            return "a dropout of its own inside the layer"
    return None
