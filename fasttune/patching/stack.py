"""A stack of layers between which only real tokens travel: where padding leaves, where it comes back, and when not to.

The layers do it themselves, not the loop around them: the first one packs what it is given, the last one unpacks what
it returns, so that whoever wraps a layer (gradient checkpointing, sharding) wraps that too. Whether a call may is
decided once, before the first layer runs.

Shape legend: hidden states (B, S, E) outside, (1, T, E) between the layers, T real tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.utils.output_capturing import _active_collector

from fasttune import ops
from fasttune.ops.attention import MAX_HEAD_DIM
from fasttune.patching.plan import Plan
from fasttune.patching.rows import Call
from fasttune.patching.state import patch_of, runs_fused

# Hooks that only gather and release weights, and those that Transformers leaves behind after capturing outputs.
HARMLESS = ("torch.distributed.", "transformers.utils.output_capturing")


class _Current(threading.local):
    row_ids: Tensor | None = None


_current = _Current()


@contextmanager
def rows_numbered(row_ids: Tensor | None) -> Iterator[None]:
    """Within it, the rows that modules see are those of the padded batch with these numbers, int64 (rows,); None: all.
    Dropout asks for them, so that a row drops the same elements wherever it lies."""
    before, _current.row_ids = _current.row_ids, row_ids
    try:
        yield
    finally:
        _current.row_ids = before


def current_row_ids() -> Tensor | None:
    return None if torch.compiler.is_compiling() else _current.row_ids


def entering(layer: Any, hidden_states: Tensor, plan: Plan) -> Tensor:
    """(B, S, E) to (1, T, E) at the first layer."""
    if layer._fasttune.place[0] > 0:
        return hidden_states
    return ops.pack(hidden_states, plan.packed)[0].unsqueeze(0)


def is_last(layer: Any) -> bool:
    place, count = layer._fasttune.place
    return bool(place == count - 1)


def leaving(layer: Any, hidden_states: Tensor, plan: Plan) -> Tensor:
    """(1, T, E) to (B, S, E) after the last layer, zeros at padding."""
    return ops.unpack(hidden_states[0], plan.packed) if is_last(layer) else hidden_states


def why_not_across(call: Call, device: str, dtype: torch.dtype) -> str | None:
    """None if padding can leave before the first layer of the running model; else why it stays between layers."""
    settings = patch_of(call.model).settings
    if not settings.options.packing:
        return "packing=False"
    if _active_collector.get():
        return "hidden states or attentions were asked for"
    if not runs_fused("attention", device, dtype, settings.options.requested_backend):
        return f"no fused attention for {str(dtype).removeprefix('torch.')} on {device}"
    config: Any = call.model.config
    if config.hidden_size > MAX_HEAD_DIM * config.num_attention_heads:
        return f"heads of more than {MAX_HEAD_DIM} dimensions"
    given = [name for name in ("past_key_values", "encoder_hidden_states") if call.inputs.get(name) is not None]
    if given:
        return f"{' and '.join(given)} given"
    layers = stack_of(call.model)
    for place, layer in enumerate(layers):
        if getattr(patch_of(layer), "place", None) != (place, len(layers)):
            return "its layers are not those that were patched"
    return next(filter(None, (layer.why_not_packed(call.inputs) or why_hooked(layer) for layer in layers)), None)


def stack_of(part: nn.Module) -> list[Any]:
    """The layers of a patched model, first to last."""
    from fasttune.patching.families import family_named

    return list(family_named(patch_of(part).settings.family).layers(part))


def why_hooked(layer: nn.Module, harmless: tuple[str, ...] = HARMLESS) -> str | None:
    """Whether somebody looks into a layer."""
    if _has_any_global_hook():
        return "global module hooks"
    for module in layer.modules():
        if "forward" in module.__dict__:
            return f"{type(module).__name__}.forward was replaced on the instance"
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            if hooks and not all(str(getattr(h, "__module__", "")).startswith(harmless) for h in hooks.values()):
                return f"hooks on {type(module).__name__}"
    return None
