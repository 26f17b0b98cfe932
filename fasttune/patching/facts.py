"""What the host has to know of a batch before the layers run, fetched from the device in one go.

How many tokens are real and how many rows the head reads are the sizes of tensors to come. A GPU's queue runs dry while
the host waits for such a number, so it waits once, where the model is entered, and not wherever one is needed.

Shape legend: mask, rows (B, S) bool.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fasttune.patching.rows import Call, rows_read


@dataclass(frozen=True)
class Facts:
    """real: tokens that are no padding. longest: length of the longest sequence. read: rows of the last hidden state
    that the head reads, None for all of them; read_at_padding: how many of these are padding; read_after_a_token: how
    many of those come after a real token of their sequence."""

    shape: tuple[int, int]
    real: int
    longest: int
    read: int | None = None
    read_at_padding: int = 0
    read_after_a_token: int = 0

    @property
    def full(self) -> bool:
        """Whether there is no padding."""
        return self.real == self.shape[0] * self.shape[1]


def facts_of(call: Call | None, mask: Tensor) -> Facts:
    """Of a batch with this mask, False at padding. call: whose head reads the rows; None: `read` is not told."""
    if call is not None and call.facts is not None and call.facts[0] is mask:
        return call.facts[1]
    shape = (mask.shape[0], mask.shape[1])
    lengths = mask.sum(1)
    numbers = [lengths.sum(), lengths.max() if lengths.numel() else lengths.sum()]
    rows = None if call is None else rows_read(call, mask)
    if rows is not None:
        at_padding = rows & ~mask
        numbers += [rows.sum(), at_padding.sum(), (at_padding & (mask.cumsum(1) > 0)).sum()]
    real, longest, *read = fetch(numbers)
    facts = Facts(shape, real, longest, *read)
    if call is not None and call.facts is None:
        call.facts = mask, facts
    return facts


def facts_of_call(call: Call, shape: tuple[int, int], device: torch.device) -> Facts:
    """What was read when the running call's mask was made; of a batch without padding if there was no mask."""
    if call.facts is not None:
        return call.facts[1]
    rows = rows_read(call, torch.ones(shape, dtype=torch.bool, device=device))
    facts = Facts(shape, shape[0] * shape[1], shape[1], None if rows is None else fetch([rows.sum()])[0])
    call.facts = None, facts
    return facts


def fetch(numbers: list[Tensor]) -> list[int]:
    """The values of tensors with one element each. The host waits for the device, once."""
    values: list[int] = torch.stack(numbers).tolist()
    return values
