"""What happened in a patched model: which shortcut ran in how many calls, in how many not, and why."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import torch
from torch import nn

from fasttune.ops import _backends
from fasttune.patching.engine.patch import supported_parts, why_left_alone
from fasttune.patching.families.spec import Family, Replacement
from fasttune.patching.marks import ModelPatch, ModulePatch, Settings, patch_of
from fasttune.patching.options import Options

NEVER = "has not run yet"
INSIDE = "in one with the module around it"


@dataclass(frozen=True)
class Row:
    """modules: their path, numbers folded ("h.{0-11}.mlp"); count: how many; stock: their stock class; runs: what runs
    now ("" if stock does); backend: which; note: why it was left alone, or stepped aside and in how many calls; calls:
    of the modules in which it ran."""

    modules: str
    count: int
    stock: str
    runs: str
    backend: str
    note: str
    calls: int = 0


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
        for heading in ("module", "stock class", "runs now", "backend", "calls", "note"):
            table.add_column(heading, overflow="fold", justify="right" if heading == "calls" else "left")
        for row in self.rows:
            count = f" x {row.count}" if row.count > 1 else ""
            runs = row.runs or ("stock" if row.stock else "")
            calls = str(row.calls) if row.runs else ""
            table.add_row(f"{row.modules}{count}", row.stock, runs, row.backend, calls, row.note)
        text = StringIO()
        Console(file=text, width=100, markup=False).print(table)
        return text.getvalue().rstrip()


def report(model: nn.Module) -> PatchReport:
    """What `fasttune.patch` did to this model, as it stands now: modules exchanged since are seen."""
    rows: list[Row] = []
    for part, family in supported_parts(model):
        patch = patch_of(part)
        if isinstance(patch, (ModelPatch, ModulePatch)):
            rows += _rows(part, family, patch.settings)
    return PatchReport(type(model).__name__, tuple(rows))


def _rows(part: Any, family: Family, settings: Settings) -> list[Row]:
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
        if name not in rules or name in covered or rules[name].group == "packing or trim" or name == "":
            continue
        rule = rules[name]
        if isinstance(module, rule.by) and patch_of(module) is not None:
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
    rows = []
    for (_, stock, runs, backend, note), names in groups.items():
        marks = [patch_of(part.get_submodule(name)) for name in names] if runs else []
        calls = sum(mark.calls for mark in marks)
        if not note and runs:
            inside = any(
                _ran(settings, rules[owner], part.get_submodule(owner))
                for owner in rules
                if owner and names[0].startswith(owner + ".")
            )
            note = _told(calls, sum((mark.asides for mark in marks), Counter()), inside)
        rows.append(Row(fold(names), len(names), stock, runs, backend, note, calls))
    return rows + _skipped_work_rows(settings, family, part)


def _ran(settings: Settings, rule: Replacement, module: Any) -> bool:
    """Whether a replacement has run; that of a layer as one piece."""
    if rule.group == "packing or trim":
        return settings.ran["layers"] > 0
    mark = patch_of(module)
    return mark is not None and mark.calls > 0


def _told(calls: int, asides: Counter[str], inside: bool) -> str:
    """Why it did not run, and in how many calls. inside: a module that it is a part of did its work."""
    told = [f"stepped aside {n} times: {why}" for why, n in asides.items()]
    if not told and not calls:
        told.append(INSIDE if inside else NEVER)
    return "; ".join(told)


SKIPPED = {
    "packing": "padding left out from the first layer to the last",
    "trim": "last layer for the rows that are read",
    "layers": "whole layers in one, fused",
}


def _skipped_work_rows(settings: Settings, family: Family, part: Any) -> list[Row]:
    """What packing and trim do, which need the patched attention, and who read every row all the same."""
    rows = []
    for option, does in SKIPPED.items():
        left = None if getattr(settings.options, option, True) else f"{option}=False"
        if left is None and not settings.options.attention:
            left = "attention was left alone"
        told = [f"stepped aside {n} times: {why}" for (of, why), n in settings.asides.items() if of == option]
        if left is None and not told and not settings.ran[option]:
            told = [NEVER]
        note = left or "; ".join(told)
        rows.append(Row(f"({option})", 1, "", "" if left else does, "", note, settings.ran[option]))
    if settings.reads:
        note = "; ".join(f"{n} by {reader}" for reader, n in settings.reads.most_common())
        rows.append(Row("(reads)", 1, "", "every row of a tensor computed", "", note, settings.reads.total()))
    return rows


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
