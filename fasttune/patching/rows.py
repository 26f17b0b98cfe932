"""Which rows of the last hidden state a head reads, known before the first layer runs.

Stock computes a hidden state at padding too, and now and then it matters: extractive question answering normalises over
all positions, and labels may have been left on padding. So padding is dropped only in calls where nobody reads it. Two
hooks on the patched model remember the running call; readers (one per head, named in the family's spec) look at it.

Shape legend: mask, rows (B, S) bool; sequences of several choices are flattened into B first, as the models do.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fasttune.patching.state import ModelPatch, patch_of

if TYPE_CHECKING:
    from fasttune.patching.facts import Facts

IGNORED = -100  # the label that every loss in Transformers ignores


@dataclass
class Call:
    """A running forward of a patched model."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tied: tuple[Tensor, Tensor, Tensor] | None = None  # a weight and its aliases for lookup and head
    facts: tuple[Tensor | None, Facts] | None = None  # of the batch, and the mask that they were read from

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """The forward's arguments by name."""
        names = _parameter_names(type(self.model))  # type: ignore[arg-type]
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}


class _Calls(threading.local):
    def __init__(self) -> None:
        self.stack: list[Call] = []


_calls = _Calls()


def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        _calls.stack.append(Call(module, args, kwargs))


def leave(module: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        while _calls.stack:
            if _calls.stack.pop().model is module:
                return


def running_call() -> Call | None:
    """The innermost forward of a patched model that is running in this thread."""
    return _calls.stack[-1] if _calls.stack else None


def call_of(config: Any) -> Call | None:
    """The running call, if it is one of the model with this config: somebody may call a model inside it directly."""
    call = running_call()
    return call if call is not None and getattr(call.model, "config", None) is config else None


def watch(model: nn.Module) -> None:
    """Remembers calls of `model` while they run."""
    model.register_forward_pre_hook(enter, with_kwargs=True)
    model.register_forward_hook(leave, always_call=True)


def unwatch(model: nn.Module) -> None:
    """Takes the hooks off again; found by function, since handles do not survive a deep copy."""
    for hooks, function in ((model._forward_pre_hooks, enter), (model._forward_hooks, leave)):
        for key in [key for key, hook in hooks.items() if hook is function]:
            del hooks[key]
            for extra in (
                model._forward_pre_hooks_with_kwargs,
                model._forward_hooks_with_kwargs,
                model._forward_hooks_always_called,
            ):
                extra.pop(key, None)


@cache
def _parameter_names(model_class: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(model_class.forward).parameters)[1:]


def why_padding_is_read(facts: Facts, *, causal: bool) -> str | None:
    """None if no row at padding reaches the output of the running call; else a reason. Causal rows that see no real
    token are 0 in stock too and may be read."""
    if facts.read is None:
        return "all rows are read, padding included"
    read = facts.read_after_a_token if causal else facts.read_at_padding
    return "rows at padding carry labels or are read" if read else None


def rows_read(call: Call, mask: Tensor) -> Tensor | None:
    """Which rows (B, S) of the last hidden state the head of a running call reads; None for all of them."""
    patch: ModelPatch = patch_of(call.model)
    reader = _reader(call.model, patch.settings.family)
    vouched = patch.settings.options.packing is True
    if reader is None or reader is all_rows or (reader in OF_EVERY_TOKEN and not call.model.training and not vouched):
        return None
    rows: Tensor | None = reader(call.inputs, mask, call.model.config)
    if rows is None and vouched and (reader is for_the_caller or reader in OF_EVERY_TOKEN):
        return _first(mask) if getattr(call.model, "pooler", None) is not None else torch.zeros_like(mask)
    return rows


def may_trim(call: Call) -> bool:
    """Whether the head of a running call reads few rows of a hidden state that is computed on demand."""
    reader = _reader(call.model, patch_of(call.model).settings.family)
    if reader in (labelled, labelled_next, labelled_and_first, last_token):
        return call.model.training and torch.is_grad_enabled()  # logits of all rows in evaluation
    return reader in (first_row, summary_row)


def labelled_rows(tokens: int) -> int | None:
    """How many of its tokens carry a label in the running call, as the model's own loss will count them; None where
    that was not read, not at this number of tokens, or where somebody put a loss of their own in its place."""
    call = running_call()
    if call is None or call.facts is None or prod(call.facts[1].shape) != tokens:
        return None
    counted = _reader(call.model, patch_of(call.model).settings.family) in (labelled, labelled_next)
    return call.facts[1].read if counted and not hasattr(call.model, "_loss_function") else None


def in_training() -> bool:
    """Whether the running patched model is in training mode. A reentrant checkpoint runs it without gradients first,
    and that run has to draw the dropout masks that the second one will draw."""
    return bool(_calls.stack) and _calls.stack[-1].model.training


def labels_given() -> bool:
    """Whether the running patched model was called with labels=, and so computes a loss itself."""
    return bool(_calls.stack) and _calls.stack[-1].inputs.get("labels") is not None


def note_on_running_call(what: str, why: str) -> None:
    """Counts a call of the running patched model in which `what` stepped aside."""
    call = running_call()
    if call is not None:
        patch_of(call.model).settings.aside(what, why)


def _reader(model: nn.Module, family_name: str) -> Any:
    from fasttune.patching.families import family_named

    heads = family_named(family_name).heads
    cls: Any = type(model)
    base: Any = next((base for base in cls.__mro__ if base in heads), None)
    # A subclass with a forward of its own may read any row.
    return heads[base] if base is not None and cls.forward is base.forward else None


# Readers. Each takes the forward's arguments by name, the mask (B, S) and the config; None means all rows.


def all_rows(inputs: Mapping[str, Any], mask: Tensor, config: Any) -> Tensor | None:
    """Question answering normalises over all of them."""
    return None


def for_the_caller(inputs: Mapping[str, Any], mask: Tensor, config: Any) -> Tensor | None:
    """Models without a head: whoever gets the hidden states may read any; packing=True vouches that nobody does."""
    return None


def first_row(inputs: Mapping[str, Any], mask: Tensor, config: Any) -> Tensor | None:
    """Pooled heads read the first token."""
    return _first(mask)


def labelled(inputs: Mapping[str, Any], mask: Tensor, config: Any) -> Tensor | None:
    """Masked language modelling."""
    labels = inputs.get("labels")
    return None if labels is None or labels.numel() != mask.numel() else (labels != IGNORED).view_as(mask)


def labelled_tokens(inputs: Mapping[str, Any], mask: Tensor, config: Any) -> Tensor | None:
    """Token classification: as `labelled`, but logits are there for all tokens."""
    return labelled(inputs, mask, config)


def labelled_next(inputs: Mapping[str, Any], mask: Tensor, config: Any) -> Tensor | None:
    """Causal language modelling: row i predicts label i + 1."""
    labels, shifted = inputs.get("labels"), inputs.get("shift_labels")
    logits_to_keep = inputs.get("logits_to_keep", 0)
    plain = isinstance(logits_to_keep, int) and logits_to_keep == 0 and "ignore_index" not in inputs
    if labels is None or not plain or labels.numel() != mask.numel():
        return None
    if shifted is not None:
        return (shifted != IGNORED).view_as(mask) if shifted.numel() == mask.numel() else None
    return nn.functional.pad(labels.view_as(mask)[:, 1:] != IGNORED, (0, 1), value=False)


def labelled_and_first(inputs: Mapping[str, Any], mask: Tensor, config: Any) -> Tensor | None:
    """BERT's pretraining pair: masked language modelling, and the first row for the next sentence."""
    rows = labelled(inputs, mask, config)
    return None if rows is None or inputs.get("next_sentence_label") is None else rows | _first(mask)


def real_if_labelled(inputs: Mapping[str, Any], mask: Tensor, config: Any) -> Tensor | None:
    """ELECTRA's discriminator leaves padding out of its loss by the mask."""
    return None if inputs.get("labels") is None else mask


def summary_row(inputs: Mapping[str, Any], mask: Tensor, config: Any) -> Tensor | None:
    """ELECTRA's sequence summary."""
    return _first(mask) if config.summary_type == "first" else None


def last_token(inputs: Mapping[str, Any], mask: Tensor, config: Any) -> Tensor | None:
    """GPT-2's classifier: the last token that is not the padding id, or plainly the last."""
    input_ids = inputs.get("input_ids")
    if input_ids is None or config.pad_token_id is None:
        return _row(mask, torch.full((mask.shape[0],), mask.shape[1] - 1, device=mask.device))
    places = torch.arange(mask.shape[1], device=mask.device)
    return _row(mask, (places * (input_ids.view_as(mask) != config.pad_token_id)).argmax(-1))


def labelled_next_and_choice(inputs: Mapping[str, Any], mask: Tensor, config: Any) -> Tensor | None:
    """GPT-2's double heads: labelled rows, and one row per choice."""
    rows = labelled_next(inputs, mask, config)
    if rows is None or config.summary_type != "cls_index":
        return None
    choice = inputs.get("mc_token_ids")
    if choice is None:
        choice = torch.full((mask.shape[0],), mask.shape[1] - 1, device=mask.device)
    return rows | _row(mask, choice.reshape(-1)) if choice.numel() == mask.shape[0] else None


# Their logits of every token are handed out in evaluation, padding included; packing=True vouches that nobody looks.
OF_EVERY_TOKEN = (
    labelled,
    labelled_tokens,
    labelled_next,
    labelled_and_first,
    labelled_next_and_choice,
    real_if_labelled,
)


def _first(mask: Tensor) -> Tensor:
    rows = torch.zeros_like(mask)
    rows[:, :1] = True
    return rows


def _row(mask: Tensor, index: Tensor) -> Tensor:
    """One row per sequence, at index (B,)."""
    return torch.arange(mask.shape[1], device=mask.device) == index[:, None]
