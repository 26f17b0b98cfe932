"""Training steps in which much of the padded batch is needed by nobody: padding, ignored labels, unread rows.

The needed products are those of real tokens, with the last layer's queries, output projection and MLP for the rows that
the loss reads. A row's notes hold how much of the batch is real tokens (fill) and how many of those carry a label.

    python benchmarks/padding_workloads.py bert-base-classification fasttune

prints the peak memory of a step of one side beyond what was there before, in bytes, after a first step.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import memory
import products
import step_workloads
import torch
from products import Product
from step_workloads import Batch
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


def read_rows(config: Any, head: str, batch: Batch) -> list[list[int]]:
    """Of each sequence, the positions of the last hidden state that the loss reads."""
    if head == "classification":
        return [[0] for _ in batch.lengths]
    labels = batch.inputs(config.vocab_size, head)["labels"]
    if config.model_type == "gpt2":
        labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    return [(row != -100).nonzero().flatten().tolist() for row in labels]


def attention_of_rows(lengths: Sequence[int], read: list[list[int]], heads: int, head_dim: int, *, causal: bool):
    """The six products of attention with these queries of each sequence alone."""
    needed: list[Product] = []
    for length, positions in zip(lengths, read, strict=True):
        rows = len(positions)
        if rows == 0:
            continue
        seen = sum(position + 1 for position in positions) / (rows * length) if causal else 1.0
        needed += [
            Product(rows, head_dim, length, 2 * seen, heads, transposed_b=True),
            Product(rows, length, head_dim, 2 * seen, heads),
            Product(length, rows, head_dim, 2 * seen, heads, transposed_a=True),
        ]
    return needed


def needed_products(config: Any, head: str, batch: Batch) -> list[Product]:
    """Of a step that skips what nobody reads."""
    read = read_rows(config, head, batch)
    rows, chosen = sum(batch.lengths), sum(len(positions) for positions in read)
    gpt2 = config.model_type == "gpt2"
    width = config.n_embd if gpt2 else config.hidden_size
    heads = config.n_head if gpt2 else config.num_attention_heads
    layers = config.n_layer if gpt2 else config.num_hidden_layers
    inner = (config.n_inner or 4 * width) if gpt2 else config.intermediate_size
    linear = partial(products.linear, conv1d=gpt2)
    below = layers - 1
    found = [*linear(rows, width, inner, below), *linear(rows, inner, width, below), *linear(rows, width, width, below)]
    found += linear(rows, width, 3 * width, below) if gpt2 else linear(rows, width, width, 3 * below)
    found += linear(rows, width, 2 * width) if gpt2 else linear(rows, width, width, 2)
    found += [*linear(chosen, width, width, 2), *linear(chosen, width, inner), *linear(chosen, inner, width)]
    found += products.attention(batch.lengths, heads, width // heads, below, causal=gpt2)
    found += attention_of_rows(batch.lengths, read, heads, width // heads, causal=gpt2)
    if gpt2:
        return found + products.linear(chosen, width, config.vocab_size)
    if head == "classification":
        return found + products.linear(chosen, width, width) + products.linear(chosen, width, step_workloads.LABELS)
    return found + products.linear(chosen, width, width) + products.linear(chosen, width, config.vocab_size)


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
    return replace(row, products=lambda: needed_products(config, head, batch), notes=notes)


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


def peak_bytes(name: str, side: str) -> int:
    """Of a step of one side, in a process of its own."""
    command = [sys.executable, __file__, name, side]
    environment = {**os.environ, **memory.SETTINGS}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _measure(name: str, side: str) -> int:
    torch.set_num_threads(2)
    row = workloads(quick=False)[name]()
    step = row.sides[side]()
    step()  # the optimizer's state and the gradients' memory are there after it
    return memory.measure(replace(row, sides={side: lambda: step}), side)


if __name__ == "__main__":
    print(_measure(*sys.argv[1:]))
