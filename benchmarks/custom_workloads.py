"""Training steps of modules that people write around a bare encoder, and of heads that read padding.

A row's encoder is a `BertModel` that was patched by itself; nothing tells it what reads its output. The row to compare
with is `BertForSequenceClassification` on the same batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import products
import step_workloads
import torch
from batches import LABELS, Batch
from needed import attention_of_rows
from products import Product
from torch import Tensor, nn
from transformers import BertForQuestionAnswering, BertForSequenceClassification, BertModel
from workload import OURS, Step, Workload

import fasttune

HIDDEN = 256  # of the LSTM, each way


class Custom(nn.Module):
    """An encoder without a pooler, and a linear layer over what `reads` makes of its output."""

    def __init__(self, config: Any, reads: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.reads, self.head = reads, nn.Linear(config.hidden_size, LABELS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return nn.functional.cross_entropy(self.head(self.reads(hidden, attention_mask)), labels)


class Tagger(nn.Module):
    """A BiLSTM over the real tokens, by pack_padded_sequence; its mean decides."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.lstm = nn.LSTM(config.hidden_size, HIDDEN, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * HIDDEN, LABELS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        lengths = attention_mask.sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(hidden, lengths, batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return nn.functional.cross_entropy(self.head(states.sum(1) / lengths[:, None]), labels)


def first(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[:, 0]


def mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """As sentence-transformers' documentation writes it."""
    expanded = mask.unsqueeze(-1).expand(hidden.size()).float()
    return (hidden * expanded).sum(1) / expanded.sum(1).clamp(min=1e-9)


def largest(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask.unsqueeze(-1) == 0, -1e9).max(1).values


@dataclass(frozen=True)
class Kind:
    """make: the module of a configuration. reads: of a sequence's length and the batch's, how many rows of the last
    layer are needed. padding: whether rows at padding are needed in every layer. head: products beyond the encoder's,
    of the number of sequences, of rows that are read and of features."""

    make: Callable[[Any], nn.Module]
    reads: Callable[[int, int], int]
    head: Callable[[int, int, int], list[Product]]
    padding: bool = False


def _classifier(sequences: int, rows: int, width: int) -> list[Product]:
    return products.linear(sequences, width, LABELS)


def _pooler(sequences: int, rows: int, width: int) -> list[Product]:
    return products.linear(sequences, width, width) + _classifier(sequences, rows, width)


def _lstm(sequences: int, rows: int, width: int) -> list[Product]:
    """The recurrent products run step by step; they are counted as if they did not."""
    one_way = products.linear(rows, width, 4 * HIDDEN, 2) + products.linear(rows, HIDDEN, 4 * HIDDEN, 2)
    return one_way + products.linear(sequences, 2 * HIDDEN, LABELS)


KINDS = {
    "classification": Kind(BertForSequenceClassification, lambda own, longest: 1, _pooler),
    "first-token": Kind(partial(Custom, reads=first), lambda own, longest: 1, _classifier),
    "masked-mean": Kind(partial(Custom, reads=mean), lambda own, longest: own, _classifier),
    "masked-max": Kind(partial(Custom, reads=largest), lambda own, longest: own, _classifier),
    "bilstm": Kind(Tagger, lambda own, longest: own, _lstm),
    "question-answering": Kind(
        BertForQuestionAnswering,
        lambda own, longest: longest,
        lambda sequences, rows, width: products.linear(rows, width, 2),
        padding=True,
    ),
}


def needed(config: Any, kind: Kind, batch: Batch) -> list[Product]:
    """The encoder's products: keys and values of real tokens, the rest for the rows that are read; in the layers below
    the last one for real tokens, or for all where the reader wants rows at padding."""
    longest, tokens, layers = max(batch.lengths), sum(batch.lengths), config.num_hidden_layers
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    last = [list(range(kind.reads(length, longest))) for length in batch.lengths]
    below = [list(range(longest if kind.padding else length)) for length in batch.lengths]
    found = kind.head(len(batch.lengths), sum(map(len, last)), width)
    for read, count in ((below, layers - 1), (last, 1)):
        rows = sum(map(len, read))
        found += products.linear(tokens, width, width, 2 * count) + products.linear(rows, width, width, 2 * count)
        found += products.linear(rows, width, inner, count) + products.linear(rows, inner, width, count)
        found += attention_of_rows(batch.lengths, read, heads, width // heads, causal=False) * count
    return found


def _side(name: str, config: Any, kind: Kind, inputs: dict[str, Tensor]) -> Step:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    if name != OURS:
        config._attn_implementation = "eager" if name == "stock eager" else "sdpa"
    model = kind.make(config)
    if name == OURS:
        fasttune.patch(getattr(model, "encoder", model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        outputs = model(**inputs)
        (outputs if isinstance(outputs, Tensor) else outputs.loss).backward()
        optimizer.step()

    return step


def custom_step(label: str, config: Any, kind: Kind, batch: Batch) -> Workload:
    inputs = batch.inputs(config.vocab_size, "classification")
    if kind.padding:  # an answer in each sequence
        inputs["start_positions"] = torch.tensor([length // 3 for length in batch.lengths])
        inputs["end_positions"] = torch.tensor([length // 2 for length in batch.lengths])
        del inputs["labels"]
    tokens = sum(batch.lengths)
    return Workload(
        group="training step",
        shape=f"{label}, {batch}",
        dtype="float32",
        sides={name: partial(_side, name, config, kind, inputs) for name in (OURS, "stock sdpa", "stock eager")},
        products=lambda: needed(config, kind, batch),
        notes={"tokens": tokens, "fill": tokens / (len(batch.lengths) * max(batch.lengths))},
    )


def workloads(quick: bool) -> dict[str, Any]:
    """Every row by name, not built yet."""
    config = step_workloads._configs(quick)["bert"]
    ragged = Batch.ragged(*((3, 3, 17) if quick else (16, 20, 128)))
    questions = Batch.ragged(*((3, 5, 17) if quick else (8, 128, 384)))  # two thirds filled
    return {
        f"bert-base-{name}": partial(
            custom_step, f"BERT-base, {name.replace('-', ' ')}", config, kind, questions if kind.padding else ragged
        )
        for name, kind in KINDS.items()
    }
