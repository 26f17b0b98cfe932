"""What runs now in a patched model, and why the rest was left alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import torch
from torch import nn

from fasttune.ops import _backends
from fasttune.patching.engine import supported_parts, why_attention_left_alone, why_left_alone
from fasttune.patching.options import Options
from fasttune.patching.spec import Family, Replacement
from fasttune.patching.state import ModelPatch, Settings, patch_of


@dataclass(frozen=True)
class Row:
    """modules: their path, numbers folded ("h.{0-11}.mlp"); count: how many; stock: their stock class; runs: what runs
    now ("" if stock does); backend: which; note: why it was left alone, or stepped aside and in how many calls."""

    modules: str
    count: int
    stock: str
    runs: str
    backend: str
    note: str


@dataclass(frozen=True)
class PatchReport:
    model: str
    rows: tuple[Row, ...] = field(default=())

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        if not self.rows:
            return f"{self.model}: not patched"
        table = Table(title=f"fasttune on {self.model}", title_justify="left")
        for heading in ("module", "stock class", "runs now", "backend", "note"):
            table.add_column(heading, overflow="fold")
        for row in self.rows:
            count = f" x {row.count}" if row.count > 1 else ""
            runs = row.runs or ("stock" if row.stock else "")
            table.add_row(f"{row.modules}{count}", row.stock, runs, row.backend, row.note)
        text = StringIO()
        Console(file=text, width=150, markup=False).print(table)
        return text.getvalue().rstrip()


def report(model: nn.Module) -> PatchReport:
    """What `fasttune.patch` did to this model, as it stands now: modules exchanged since are seen."""
    rows: list[Row] = []
    for part, family in supported_parts(model):
        patch = patch_of(part)
        if isinstance(patch, ModelPatch):
            rows += _rows(part, family, patch)
    return PatchReport(type(model).__name__, tuple(rows))


def _rows(part: Any, family: Family, patch: ModelPatch) -> list[Row]:
    settings = patch.settings
    tensor = next(iter(part.parameters()), torch.empty(0))
    rules: dict[str, Replacement] = {}
    covered: set[str] = set()
    for name, module in part.named_modules():
        rule = family.replacement(name, module)
        if rule is not None:
            rules[name] = rule
            if isinstance(module, rule.by):
                covered |= {f"{name}.{child}" for child in rule.covers}
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, module in part.named_modules():
        if name not in rules or name in covered:
            continue
        rule = rules[name]
        if isinstance(module, rule.by):
            state = (rule.does, _backend(rule.operation, tensor, settings.options), "")
        else:
            left = why_left_alone(name, module, rule, settings.options)
            state = ("", "", left or "put in after patching; call fasttune.patch again")
        groups.setdefault((skeleton(name), rule.stock.__name__, *state), []).append(name)
    for name, module in part.named_modules():  # an adapter, say, in the place of a layer
        for rule in family.replacements:
            if rule.only and rule.named(name) and not isinstance(module, rule.stock):
                note = f"its class is {type(module).__module__}.{type(module).__name__}, not {rule.stock.__name__}"
                groups.setdefault((skeleton(name), type(module).__name__, "", "", note), []).append(name)
    asides = dict(settings.asides)
    rows = _attention_rows(part, family, settings, tensor)
    for (_, stock, runs, backend, note), names in groups.items():
        told = [f"stepped aside {n} times: {why}" for (what, why), n in asides.items() if what == runs]
        if stock == "Linear" and runs:
            told.append("logits at once in evaluation and inside torch.compile")
        rows.append(Row(fold(names), len(names), stock, runs, backend, "; ".join(filter(None, [note, *told]))))
    return rows + _skipped_work_rows(part, settings)


SKIPPED = {
    "packing": "padding left out from the first layer to the last",
    "trim": "last layer for the rows that are read",
}


def _skipped_work_rows(part: Any, settings: Settings) -> list[Row]:
    """What packing and trim do; both need the patched attention."""
    rows = []
    for option, does in SKIPPED.items():
        left = None if getattr(settings.options, option) else f"{option}=False"
        if left is None and why_attention_left_alone(part, settings.options) is not None:
            left = "attention was left alone"
        told = [f"stepped aside {n} times: {why}" for (what, why), n in settings.asides.items() if what == option]
        rows.append(Row(f"({option})", 1, "", "" if left else does, "", left or "; ".join(told)))
    return rows


def _attention_rows(part: Any, family: Family, settings: Settings, tensor: torch.Tensor) -> list[Row]:
    told = [f"stepped aside {n} times: {why}" for (what, why), n in settings.asides.items() if what == "attention"]
    note = why_attention_left_alone(part, settings.options)
    if note is None and not part.config._attn_implementation.startswith("fasttune"):
        note = "changed after patching; call fasttune.patch again"
    runs = "" if note else "attention without a T x T tensor"
    backend = "" if note else _backend("attention", tensor, settings.options)
    groups: dict[tuple[str, str], list[str]] = {}
    for name, module in part.named_modules():
        if isinstance(module, family.attentions):
            groups.setdefault((skeleton(name), type(module).__name__), []).append(name)
    return [
        Row(fold(names), len(names), stock, runs, backend, "; ".join(filter(None, [note, *told])))
        for (_, stock), names in groups.items()
    ]


def _backend(operation: str, tensor: torch.Tensor, options: Options) -> str:
    if not operation:
        return ""
    return _backends.choose(operation, tensor, options.requested_backend)


def skeleton(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def fold(names: list[str]) -> str:
    """["h.0.mlp", "h.1.mlp", "h.2.mlp"] -> "h.{0-2}.mlp". The names differ in their numbers only."""
    if len(names) == 1:
        return names[0]
    parts = [re.split(r"(\d+)", name) for name in names]
    folded = []
    for column in zip(*parts, strict=True):
        numbers = sorted({int(item) for item in column if item.isdigit()})
        folded.append(column[0] if len(set(column)) == 1 else f"{{{numbers[0]}-{numbers[-1]}}}")
    return "".join(folded)
