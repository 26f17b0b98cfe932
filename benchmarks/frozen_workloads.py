"""Training steps that train a part of the model: everything, the last layers, a head on frozen features, adapters.

A step is as in step_workloads.py, over one padded batch for all rows, so that rows compare with each other. The needed
matrix products leave out what freezing spares: no weight gradient of a frozen layer, no input gradient where nothing
below trains, no backward at all below the lowest trainable layer.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import products
import torch
from batches import LABELS, Batch
from needed import attention_of_rows, needed_products
from products import Product
from step_workloads import _configs
from torch import Tensor, nn
from transformers import BertForSequenceClassification, PreTrainedModel
from workload import OURS, Step, Workload

import fasttune

RANK = 8  # of LoRA, on queries and values
FULL, LAST, FEATURES, LORA = "full", "last layers", "features", "LoRA"


@dataclass(frozen=True)
class Part:
    """What trains. frozen: the share of layers, from below, that does not."""

    kind: str
    frozen: float = 0.0

    def __str__(self) -> str:
        if self.kind == LAST:
            return f"upper {1 - self.frozen:.0%} of the layers"
        return {FULL: "everything", FEATURES: "head on frozen features", LORA: f"LoRA of rank {RANK}"}[self.kind]

    def frozen_layers(self, layers: int) -> int:
        return round(self.frozen * layers)


def freeze(model: PreTrainedModel, part: Part) -> Any:
    """The model as it trains: itself, or a PEFT model around it."""
    if part.kind == LORA:
        import peft

        config = peft.LoraConfig(task_type="SEQ_CLS", r=RANK, target_modules=["query", "value"], lora_dropout=0.0)
        return peft.get_peft_model(model, config)
    bert = model.base_model
    if part.kind == FEATURES:
        bert.requires_grad_(False)
    elif part.kind == LAST:
        bert.embeddings.requires_grad_(False)
        for layer in bert.encoder.layer[: part.frozen_layers(len(bert.encoder.layer))]:
            layer.requires_grad_(False)
    return model


def training_step(model: Any, part: Part, inputs: dict[str, Tensor]) -> Step:
    """Zero gradients, forward, backward, optimizer; with frozen features the encoder is in evaluation, without
    gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    loss_of = partial(_loss_of_features, model) if part.kind == FEATURES else lambda **inputs: model(**inputs).loss
    model.train()
    if part.kind == FEATURES:
        model.base_model.eval()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(**inputs).backward()
        optimizer.step()

    return step


def _loss_of_features(model: Any, labels: Tensor, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        features = model.base_model(**inputs).pooler_output
    return nn.functional.cross_entropy(model.classifier(model.dropout(features)), labels)


def _some(found: list[Product], forward: bool, input_gradient: bool, weight_gradient: bool) -> list[Product]:
    """Those of a linear layer's three products that are needed."""
    wanted = (forward, input_gradient, weight_gradient)
    return [product for product, want in zip(found, wanted, strict=True) if want]


def _scaled(found: list[Product], *factors: float) -> list[Product]:
    """Of attention's products, which come in three kinds of two each (see `products.attention`), these shares."""
    return [replace(p, count=p.count * factors[i % 3]) for i, p in enumerate(found) if factors[i % 3]]


def needed(config: Any, part: Part, batch: Batch, *, whole_last_layer: bool = False) -> list[Product]:
    """The matrix products that a step of this part cannot do without; of the last layer as in `needed_products`."""
    if part.kind == FULL:
        return needed_products(config, "classification", batch, whole_last_layer=whole_last_layer)
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, sequences = config.num_attention_heads, len(batch.lengths)
    every_row = partial(products.linear, sum(batch.lengths))
    attention = products.attention(batch.lengths, heads, width // heads)
    adapters = part.kind == LORA
    frozen = layers if part.kind == FEATURES else part.frozen_layers(layers)
    found: list[Product] = []
    for layer in range(layers):
        trains, below_trains = layer >= frozen, layer > frozen
        weights = trains and not adapters
        read_row = every_row
        if layer == layers - 1 and not whole_last_layer:
            read_row = partial(products.linear, sequences)
            attention = attention_of_rows(batch.lengths, [[0]] * sequences, heads, width // heads, causal=False)
        found += _some(every_row(width, width, count=2), True, below_trains, weights)  # keys, values
        found += _some(read_row(width, width), True, below_trains, weights)  # queries
        for sizes in ((width, width), (width, inner), (inner, width)):
            found += _some(read_row(*sizes), True, trains, weights)
        if adapters:
            for linear in (read_row, every_row):  # of the queries and of the values
                found += _some(linear(width, RANK), True, below_trains, True) + linear(RANK, width)
        if not trains:
            found += _scaled(attention, 0.5, 0.5, 0.0)  # Q Kᵀ and P V
        else:  # keys without an adapter need no gradient where nothing below trains: no dSᵀ Q
            found += _scaled(attention, 1.0, 1.0, 1.0 if weights or below_trains else 0.5)
    trains_encoder = part.kind != FEATURES
    pooler, classifier = products.linear(sequences, width, width), products.linear(sequences, width, LABELS)
    found += _some(pooler, True, trains_encoder, part.kind == LAST)
    return found + _some(classifier, True, trains_encoder, True)


def _side(name: str, config: Any, part: Part, batch: Batch) -> Step:
    torch.manual_seed(0)
    model = BertForSequenceClassification(copy.deepcopy(config))
    if name == OURS and part.kind == FEATURES:  # the encoder is called by itself, and nobody reads its padding
        fasttune.patch(model.base_model, packing=True)
    elif name == OURS:
        fasttune.patch(model)
    else:
        model.set_attn_implementation("eager" if name == "stock eager" else "sdpa")
    return training_step(freeze(model, part), part, batch.inputs(config.vocab_size, "classification"))


def frozen_step(name: str, config: Any, part: Part, batch: Batch) -> Workload:
    names = (OURS, "stock sdpa", "stock eager")
    return Workload(
        group="training step",
        shape=f"{name}, {part}, {batch}",
        dtype="float32",
        sides={side: partial(_side, side, config, part, batch) for side in names},
        products=lambda: needed(config, part, batch),
        notes={"tokens": sum(batch.lengths)},
    )


PARTS = {
    "full": Part(FULL),
    "last-layers": Part(LAST, 0.5),
    "features": Part(FEATURES),
    "lora": Part(LORA),
}


def workloads(quick: bool) -> dict[str, Any]:
    """Every row by name, not built yet."""
    config = _configs(quick)["minilm"]
    batch = Batch.ragged(*((3, 3, 17) if quick else (16, 20, 128)))
    return {
        f"minilm-6-classification-{name}": partial(frozen_step, "MiniLM-6 classification", config, part, batch)
        for name, part in PARTS.items()
    }
