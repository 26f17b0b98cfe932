"""Whole training steps: zero gradients, forward, backward, fused AdamW; default configurations, random weights.

Peers are stock Transformers with eager attention and with SDPA. Every side owns its model and optimizer. Caches are
off, as Trainer turns them off.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from batches import LABELS, Batch
from needed import needed_products
from torch import Tensor
from transformers import (
    AlbertForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DebertaV2ForSequenceClassification,
    DistilBertForSequenceClassification,
    EsmForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    MPNetForSequenceClassification,
    PreTrainedModel,
)
from workload import COMPILED, OURS, Step, Workload

import fasttune

MODELS = {
    ("gpt2", "lm"): GPT2LMHeadModel,
    ("bert", "classification"): BertForSequenceClassification,
    ("bert", "mlm"): BertForMaskedLM,
    ("distilbert", "classification"): DistilBertForSequenceClassification,
    ("albert", "classification"): AlbertForSequenceClassification,
    ("modernbert", "classification"): ModernBertForSequenceClassification,
    ("modernbert", "mlm"): ModernBertForMaskedLM,
    ("esm", "mlm"): EsmForMaskedLM,
    ("mpnet", "classification"): MPNetForSequenceClassification,
    ("deberta-v2", "classification"): DebertaV2ForSequenceClassification,
}
# Families whose code knows no attention but its own.
EAGER_ALONE = ("mpnet", "deberta-v2")


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
        if config.model_type not in EAGER_ALONE:
            model.set_attn_implementation("eager" if name == "stock eager" else "sdpa")
        if name == COMPILED:
            model = torch.compile(model)
    return _training_step(model, inputs)


def training_step(name: str, config: Any, head: str, batch: Batch, *, compiled: bool = False) -> Workload:
    names = [OURS, "stock sdpa", "stock eager", *([COMPILED] if compiled else [])]
    if config.model_type in EAGER_ALONE:
        names.remove("stock sdpa")
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
    rows = {
        "gpt2-124m": ("GPT-2 124M", config["gpt2"], "lm", gpt2),
        "bert-base-classification": ("BERT-base classification", config["bert"], "classification", full),
        "bert-base-mlm": ("BERT-base MLM", config["bert"], "mlm", replace(full, label_ratio=0.15)),
        "minilm-6-classification": ("MiniLM-6 classification", config["minilm"], "classification", full),
    }
    return {name: partial(training_step, *row) for name, row in rows.items()}
