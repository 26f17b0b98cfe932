"""The matrix products that a training step needs, by model, head and batch: real tokens, and what the loss reads.

Keys and values of the last layer are needed for every real token, its queries, output projection and MLP only for the
rows that the loss reads, the vocabulary projection only for those with a label. Of disentangled attention's embeddings
those are needed that the distances within a sequence reach.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import products
import torch
from batches import LABELS, Batch
from products import Product
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position


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


def reached(config: Any, length: int) -> int:
    """How many of DeBERTa's embeddings the pairs of so many tokens go by."""
    furthest = config.max_relative_positions
    return _reached(config.position_buckets, furthest if furthest > 0 else config.max_position_embeddings, length)


@cache
def _reached(buckets: int, furthest: int, length: int) -> int:
    tokens, span = torch.empty(length, 0), buckets if buckets > 0 else furthest
    numbers = build_relative_position(tokens, tokens, bucket_size=buckets, max_position=furthest)
    return int((numbers + span).clamp(0, 2 * span - 1).unique().numel())


def met(rows: int, head_dim: int, embeddings: int, heads: int, count: float = 1.0) -> list[Product]:
    """Queries or keys with embeddings: forward and both gradients."""
    return [
        Product(rows, head_dim, embeddings, count, heads, transposed_b=True),
        Product(rows, embeddings, head_dim, count, heads),
        Product(embeddings, rows, head_dim, count, heads, transposed_a=True),
    ]


def disentangled(
    config: Any, batch: Batch, read: list[list[int]], full: int, *, whole_last_layer: bool
) -> list[Product]:
    """What queries and keys do with DeBERTa's embeddings, and the projections of these."""
    width, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    head_dim, found = width // heads, []
    for length, sequences in Counter(batch.lengths).items():
        found += met(length, head_dim, reached(config, length), sequences * heads, 2 * full)
    if not whole_last_layer:
        for length, positions in zip(batch.lengths, read, strict=True):
            queries, all_of_them = len(positions), reached(config, length)
            if queries:
                found += met(queries, head_dim, min(queries * length, all_of_them), heads)
                found += met(length, head_dim, min(queries, all_of_them), heads)
    return found + products.linear(reached(config, max(batch.lengths)), width, width, 2 * layers)


@dataclass(frozen=True)
class Sizes:
    """Of a model. gates: 2 in a gated MLP, whose activation takes two inputs for each value. windows: of the layers
    that have one. embedding: of the vocabulary, if narrower than the layers."""

    width: int
    heads: int
    layers: int
    inner: int
    gates: int = 1
    windows: tuple[int | None, ...] = ()
    embedding: int = 0
    fused: bool = False  # query, key and value by one product

    @classmethod
    def of(cls, config: Any) -> Sizes:
        width, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
        if config.model_type == "gpt2":
            return cls(width, heads, layers, config.n_inner or 4 * width, fused=True)
        if config.model_type == "distilbert":
            return cls(width, heads, layers, config.hidden_dim)
        if config.model_type == "modernbert":
            windows = [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
            return cls(width, heads, layers, config.intermediate_size, 2, tuple(windows), fused=True)
        embedding = config.embedding_size if config.model_type == "albert" else 0
        return cls(width, heads, layers, config.intermediate_size, embedding=embedding)


def needed_products(config: Any, head: str, batch: Batch, *, whole_last_layer: bool = False) -> list[Product]:
    """Of a step that skips what nobody reads; whole_last_layer counts all of its rows, as stock computes them."""
    read, sizes, causal = read_rows(config, head, batch), Sizes.of(config), config.model_type == "gpt2"
    rows, chosen = sum(batch.lengths), sum(len(positions) for positions in read)
    width, heads, inner, head_dim = sizes.width, sizes.heads, sizes.inner, sizes.width // sizes.heads
    linear = partial(products.linear, conv1d=causal)
    full = sizes.layers if whole_last_layer else sizes.layers - 1
    found = [*linear(rows, width, sizes.gates * inner, full), *linear(rows, inner, width, full)]
    found += linear(rows, width, width, full)
    found += linear(rows, width, 3 * width, full) if sizes.fused else linear(rows, width, width, 3 * full)
    for window, count in Counter((sizes.windows or (None,) * sizes.layers)[:full]).items():
        found += products.attention(batch.lengths, heads, head_dim, count, causal=causal, window=window)
    if config.model_type == "deberta-v2":
        found += disentangled(config, batch, read, full, whole_last_layer=whole_last_layer)
    if sizes.embedding:
        found += linear(rows, sizes.embedding, width)
    if not whole_last_layer:
        found += linear(rows, width, 2 * width) if sizes.fused else linear(rows, width, width, 2)
        found += [*linear(chosen, width, width, 2), *linear(chosen, width, sizes.gates * inner)]
        found += linear(chosen, inner, width)
        found += attention_of_rows(batch.lengths, read, heads, head_dim, causal=causal)
    if causal:
        return found + products.linear(chosen, width, config.vocab_size)
    transform = sizes.embedding if head == "mlm" and sizes.embedding else width
    found += products.linear(chosen, width, transform)
    return found + products.linear(chosen, transform, LABELS if head == "classification" else config.vocab_size)
