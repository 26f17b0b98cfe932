"""Batches of token ids, padded to the longest sequence, and which of their tokens a step trains on."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

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
        """Lengths evenly spread from shortest to longest: as full as uniform lengths are on average."""
        step = (longest - shortest) / max(1, sequences - 1)
        lengths = [round(shortest + i * step) for i in range(sequences)]
        random.Random(0).shuffle(lengths)
        return cls(tuple(lengths), label_ratio)

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
