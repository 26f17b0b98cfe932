"""Training steps in which much of the padded batch is needed by nobody: padding, ignored labels, unread rows.

The needed products are those of real tokens, with the last layer's queries, output projection and MLP for the rows that
the loss reads. A row's notes hold how much of the batch is real tokens (fill) and how many of those carry a label.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import step_workloads
import torch
from batches import Batch
from needed import read_rows
from torch import Tensor
from workload import OURS, Step, Workload

import fasttune

SWITCHED_OFF = "without packing and trimming"
FILLS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Answers(Batch):
    """Half of each sequence is a prompt, whose labels are ignored."""

    def token_labels(self, tokens: Tensor) -> Tensor:
        labels = torch.full_like(tokens, -100)
        for row, length in enumerate(self.lengths):
            labels[row, length // 2 : length] = tokens[row, length // 2 : length]
        return labels


def filled(fill: float, sequences: int, longest: int) -> Batch:
    """One sequence of full length; the others uniform about the length that makes the batch this full."""
    mean = (fill * sequences * longest - longest) / (sequences - 1)
    spread = min(mean - 1, longest - mean)
    drawn = random.Random(0)
    halves = [drawn.uniform(0, spread) for _ in range((sequences - 1) // 2)]
    rest = [mean + half for half in halves] + [mean - half for half in halves] + [mean] * ((sequences - 1) % 2)
    return Batch((longest, *(max(1, min(longest, round(length))) for length in rest)))


def _switched_off(config: Any, head: str, batch: Batch) -> Step:
    torch.manual_seed(0)
    model = step_workloads.MODELS[config.model_type, head](config.__class__.from_dict(config.to_dict()))
    fasttune.patch(model, packing=False, trim=False)
    return step_workloads._training_step(model, batch.inputs(config.vocab_size, head))


def padded_step(name: str, config: Any, head: str, batch: Batch, *, compiled: bool = False) -> Workload:
    row = step_workloads.training_step(name, config, head, batch, compiled=compiled)
    read = sum(len(positions) for positions in read_rows(config, head, batch))
    tokens, places = sum(batch.lengths), len(batch.lengths) * max(batch.lengths)
    notes = {**row.notes, "fill": tokens / places, "read": read / tokens}
    return replace(row, notes=notes)


def full_step(name: str, config: Any, head: str, batch: Batch, *, compiled: bool = False) -> Workload:
    """Nothing to skip: against the same library with packing and trimming switched off."""
    row = step_workloads.training_step(name, config, head, batch)
    sides = {OURS: row.sides[OURS], SWITCHED_OFF: partial(_switched_off, config, head, batch)}
    return replace(row, sides=sides, notes={**row.notes, "fill": 1.0, "read": 1.0})


@dataclass(frozen=True)
class Masked(Batch):
    """No padding, but a mask that says so, as tokenizers hand it over."""

    def inputs(self, vocabulary: int, head: str) -> dict[str, Tensor]:
        return {**super().inputs(vocabulary, head), "attention_mask": self.mask()}


def workloads(quick: bool) -> dict[str, Any]:
    """Every row by name, not built yet."""
    config = step_workloads._configs(quick)
    sequences, shortest, longest = (3, 3, 17) if quick else (16, 20, 128)
    ragged = Batch.ragged(sequences, shortest, longest)
    answers = Answers.ragged(*((2, 5, 19) if quick else (4, 100, 512)))
    labelled = replace(ragged, label_ratio=0.15)
    rows = {
        "bert-base-classification": (padded_step, "BERT-base classification", config["bert"], "classification", ragged),
        "bert-base-mlm": (padded_step, "BERT-base MLM", config["bert"], "mlm", labelled),
        "minilm-6-classification": (padded_step, "MiniLM-6", config["minilm"], "classification", ragged),
        "gpt2-124m-answers": (padded_step, "GPT-2 124M", config["gpt2"], "lm", answers),
        "bert-base-mlm-full": (full_step, "BERT-base MLM", config["bert"], "mlm", Masked.full(sequences, longest)),
        "gpt2-124m-full": (full_step, "GPT-2 124M", config["gpt2"], "lm", Masked.full(2, 19 if quick else 512)),
    }
    for fill in FILLS if not quick else FILLS[-2:]:
        name = f"minilm-6-fill-{fill:.0%}".removesuffix("%")
        batch = filled(fill, sequences, longest)
        rows[name] = (padded_step, "MiniLM-6 by fill", config["minilm"], "classification", batch)
    return {name: partial(row[0], *row[1:]) for name, row in rows.items()}
