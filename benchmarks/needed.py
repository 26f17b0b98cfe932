"""The matrix products that a training step needs, by model, head and batch: real tokens, and what the loss reads.

Keys and values of the last layer are needed for every real token, its queries, output projection and MLP only for the
rows that the loss reads, the vocabulary projection only for those with a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import products
import torch
from batches import LABELS, Batch
from products import Product


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


def needed_products(config: Any, head: str, batch: Batch, *, whole_last_layer: bool = False) -> list[Product]:
    """Of a step that skips what nobody reads; whole_last_layer counts all of its rows, as stock computes them."""
    read = read_rows(config, head, batch)
    rows, chosen = sum(batch.lengths), sum(len(positions) for positions in read)
    gpt2 = config.model_type == "gpt2"
    width = config.n_embd if gpt2 else config.hidden_size
    heads = config.n_head if gpt2 else config.num_attention_heads
    layers = config.n_layer if gpt2 else config.num_hidden_layers
    inner = (config.n_inner or 4 * width) if gpt2 else config.intermediate_size
    linear = partial(products.linear, conv1d=gpt2)
    full = layers if whole_last_layer else layers - 1
    found = [*linear(rows, width, inner, full), *linear(rows, inner, width, full), *linear(rows, width, width, full)]
    found += linear(rows, width, 3 * width, full) if gpt2 else linear(rows, width, width, 3 * full)
    found += products.attention(batch.lengths, heads, width // heads, full, causal=gpt2)
    if not whole_last_layer:
        found += linear(rows, width, 2 * width) if gpt2 else linear(rows, width, width, 2)
        found += [*linear(chosen, width, width, 2), *linear(chosen, width, inner), *linear(chosen, inner, width)]
        found += attention_of_rows(batch.lengths, read, heads, width // heads, causal=gpt2)
    if gpt2:
        return found + products.linear(chosen, width, config.vocab_size)
    if head == "classification":
        return found + products.linear(chosen, width, width) + products.linear(chosen, width, LABELS)
    return found + products.linear(chosen, width, width) + products.linear(chosen, width, config.vocab_size)
