"""Whole training steps: zero gradients, forward, backward, fused AdamW; default configurations, random weights.

Peers are stock Transformers with eager attention and with SDPA. Every side owns its model and optimizer. Caches are
off, as Trainer turns them off.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import products
import torch
from products import Product
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)
from workload import COMPILED, OURS, Step, Workload

import fasttune

LABELS = 2  # classes of a classifier


@dataclass(frozen=True)
class Batch:
    """Which tokens a step trains on. Sequences are padded to the longest; MLM labels a share of the real tokens."""

    lengths: tuple[int, ...]
    label_ratio: float = 1.0

    @classmethod
    def full(cls, sequences: int, length: int, label_ratio: float = 1.0) -> Batch:
        return cls((length,) * sequences, label_ratio)

    @classmethod
    def ragged(cls, sequences: int, shortest: int, longest: int, label_ratio: float = 1.0) -> Batch:
        """Lengths uniform between both ends, the same ones every time."""
        drawn = random.Random(0)
        return cls(tuple(drawn.randint(shortest, longest) for _ in range(sequences)), label_ratio)

    def __str__(self) -> str:
        shortest, longest = min(self.lengths), max(self.lengths)
        shape = f"{len(self.lengths)} x {longest}"
        if shortest != longest:
            shape += f", {sum(self.lengths) / len(self.lengths) / longest:.0%} filled"
        return shape + (f", {self.label_ratio:.0%} labelled" if self.label_ratio < 1 else "")

    def mask(self) -> Tensor:
        return (torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]).long()

    def tokens(self, vocabulary: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, self.mask().shape, generator=generator) * self.mask()

    def token_labels(self, tokens: Tensor) -> Tensor:
        """The tokens themselves where they are labelled, -100 elsewhere: exactly label_ratio of each sequence."""
        generator = torch.Generator().manual_seed(1)
        labels = torch.full_like(tokens, -100)
        for row, length in enumerate(self.lengths):
            chosen = torch.randperm(length, generator=generator)[: max(1, round(self.label_ratio * length))]
            labels[row, chosen] = tokens[row, chosen]
        return labels

    def inputs(self, vocabulary: int, head: str) -> dict[str, Tensor]:
        tokens = self.tokens(vocabulary)
        inputs = {"input_ids": tokens}
        if min(self.lengths) != max(self.lengths):
            inputs["attention_mask"] = self.mask()
        inputs["labels"] = (
            torch.arange(len(self.lengths)) % LABELS if head == "classification" else self.token_labels(tokens)
        )
        return inputs


def needed_products(config: Any, head: str, batch: Batch) -> list[Product]:
    """Of a step over the real tokens with every layer in full; the vocabulary projection over labelled rows alone."""
    rows, sequences = sum(batch.lengths), len(batch.lengths)
    if config.model_type == "gpt2":
        width, layers, heads, inner = config.n_embd, config.n_layer, config.n_head, config.n_inner or 4 * config.n_embd
        linear = partial(products.linear, rows, count=layers, conv1d=True)
        found = [*linear(width, 3 * width), *linear(width, width), *linear(width, inner), *linear(inner, width)]
        found += products.attention(batch.lengths, heads, width // heads, layers, causal=True)
        predicted = int((batch.inputs(config.vocab_size, head)["labels"][:, 1:] != -100).sum())
        return found + products.linear(predicted, width, config.vocab_size)
    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    linear = partial(products.linear, rows)
    found = [*linear(width, width, count=4 * layers)]
    found += [
        *linear(width, config.intermediate_size, count=layers),
        *linear(config.intermediate_size, width, count=layers),
    ]
    found += products.attention(batch.lengths, heads, width // heads, layers)
    if head == "classification":
        return found + products.linear(sequences, width, width) + products.linear(sequences, width, LABELS)
    labelled = int((batch.inputs(config.vocab_size, head)["labels"] != -100).sum())
    return found + products.linear(labelled, width, width) + products.linear(labelled, width, config.vocab_size)


MODELS = {
    ("gpt2", "lm"): GPT2LMHeadModel,
    ("bert", "classification"): BertForSequenceClassification,
    ("bert", "mlm"): BertForMaskedLM,
}


def _training_step(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    options = {"use_cache": False} if model.config.model_type == "gpt2" else {}
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**inputs, **options).loss.backward()
        optimizer.step()

    return step


def _side(name: str, config: Any, head: str, batch: Batch) -> Step:
    torch.manual_seed(0)
    model = MODELS[config.model_type, head](copy.deepcopy(config))
    inputs = batch.inputs(config.vocab_size, head)
    if name == OURS:
        fasttune.patch(model)
    else:
        model.set_attn_implementation("eager" if name == "stock eager" else "sdpa")
        if name == COMPILED:
            model = torch.compile(model)
    return _training_step(model, inputs)


def training_step(name: str, config: Any, head: str, batch: Batch, *, compiled: bool = False) -> Workload:
    names = [OURS, "stock sdpa", "stock eager", *([COMPILED] if compiled else [])]
    return Workload(
        group="training step",
        shape=f"{name}, {batch}",
        dtype="float32",
        sides={side: partial(_side, side, config, head, batch) for side in names},
        products=lambda: needed_products(config, head, batch),
        notes={"tokens": sum(batch.lengths)},
    )


def _configs(quick: bool) -> dict[str, Any]:
    if quick:
        small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        bert = BertConfig(**small, intermediate_size=64, max_position_embeddings=32)
        gpt2 = GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=2)
        return {"gpt2": gpt2, "bert": bert, "minilm": bert}
    # all-MiniLM-L6's sizes
    minilm = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return {"gpt2": GPT2Config(), "bert": BertConfig(num_labels=LABELS), "minilm": minilm}


def workloads(quick: bool) -> dict[str, Any]:
    """Every row by name, not built yet."""
    config = _configs(quick)
    sequences, length = (3, 17) if quick else (16, 128)
    gpt2 = Batch.full(2, 19) if quick else Batch.full(2, 512)
    full = Batch.full(sequences, length)
    ragged = Batch.ragged(sequences, 3 if quick else 20, length)
    rows = {
        "gpt2-124m": ("GPT-2 124M", config["gpt2"], "lm", gpt2),
        "bert-base-classification": ("BERT-base classification", config["bert"], "classification", full),
        "bert-base-mlm": ("BERT-base MLM", config["bert"], "mlm", replace(full, label_ratio=0.15)),
        "minilm-6-classification": ("MiniLM-6 classification", config["minilm"], "classification", full),
        "bert-base-classification-padded": ("BERT-base classification", config["bert"], "classification", ragged),
        "bert-base-mlm-padded": ("BERT-base MLM", config["bert"], "mlm", replace(ragged, label_ratio=0.15)),
    }
    return {name: partial(training_step, *row) for name, row in rows.items()}
