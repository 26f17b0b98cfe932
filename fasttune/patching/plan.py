"""What the mask function found out about a batch, for every layer of the running call.

It travels as the attention mask (B, S), whose dtype and values say all of it: a tensor survives gradient checkpointing,
which hands layers a copy when it runs them again, while an attribute does not. The attribute spares building it anew.

bool   True at real tokens: attention drops the padding, layer by layer
uint8  1 at real tokens: padding leaves before the first layer and comes back after the last
int32  the number of the sequence each token belongs to, rising within a row: sequences packed by the user
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttune.ops.packing import PackedBatch, sequence_starts
from fasttune.patching.facts import Facts, fetch


@dataclass(frozen=True)
class Plan:
    """causal: whether a token sees only tokens up to itself; None where that is the attention module's affair.
    across: whether hidden states between the layers are (1, T, E), the real tokens alone."""

    packed: PackedBatch
    causal: bool | None
    across: bool


def padding_plan(mask: Tensor, facts: Facts, *, causal: bool, across: bool) -> Tensor:
    """The mask that carries a plan for padded sequences; mask (B, S) bool."""
    tagged = mask.to(torch.uint8) if across else mask.clone()
    packed = PackedBatch.from_mask(mask, total=facts.real, longest=facts.longest)
    return _tag(tagged, Plan(packed, causal, across))


def sequence_plan(packed: PackedBatch, *, causal: bool) -> Tensor:
    """The mask that carries a plan for rows in which several sequences lie side by side."""
    starts = torch.zeros(packed.total, dtype=torch.int32, device=packed.indices.device)
    starts[packed.cu_seqlens[:-1].long().clamp(max=max(packed.total - 1, 0))] = 1
    return _tag(starts.cumsum(0, dtype=torch.int32).view(packed.shape), Plan(packed, causal, False))


def plan_of(mask: Tensor | None) -> Plan | None:
    """The plan that a mask of the attention function carries; None for no mask and for a 4-D one."""
    if mask is None or mask.dim() != 2:
        return None
    plan: Plan | None = getattr(mask, "_fasttune", None)  # gone if somebody copied the mask
    if plan is not None:
        return plan
    if mask.dtype == torch.int32:
        return Plan(_packed_by_number(mask), None, False)
    return Plan(PackedBatch.from_mask(mask), None, mask.dtype == torch.uint8)


def packed_by_user(inputs: Mapping[str, Any], batch: int, length: int) -> PackedBatch | None:
    """The sequences that a model's arguments say lie side by side in its rows; None where they say nothing.

    cu_seq_lens_q (N + 1,) for a batch of one, or position ids (B, S) that start anew, each time at the value they start
    with. Like Transformers, only without an attention mask and without a cache that was handed in.
    """
    if any(inputs.get(name) is not None for name in ("attention_mask", "past_key_values", "encoder_hidden_states")):
        return None
    offsets, position_ids = inputs.get("cu_seq_lens_q"), inputs.get("position_ids")
    if isinstance(offsets, Tensor) and batch == 1:
        keys = inputs.get("cu_seq_lens_k")
        if keys is not None and not torch.equal(keys, offsets):
            return None
        longest = int(offsets.diff().max()) if offsets.numel() > 1 else 0
        return PackedBatch(torch.arange(length, device=offsets.device), offsets.to(torch.int32), longest, (1, length))
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != length or position_ids.numel() == 0:
        return None
    position_ids = position_ids.expand(batch, -1)
    starts = sequence_starts(position_ids)
    tokens = torch.arange(length, device=position_ids.device)
    since = tokens - torch.where(starts, tokens, 0).cummax(1).values
    elsewhere = starts & (position_ids != position_ids[0, 0])
    sequences, longest, wrong = fetch([starts.sum(), since.max() + 1, elsewhere.sum()])
    if sequences == batch or wrong:
        return None
    return PackedBatch.from_position_ids(position_ids, sequences=sequences, longest=longest)


def as_4d(plan: Plan, *, causal: bool) -> Tensor:
    """The stock mask, True where a query (rows) may look at a key (columns): (B, 1, S, S), or (1, 1, T, T) of the real
    tokens where hidden states are packed. For attention that has to run as stock does."""
    packed = plan.packed
    tokens = torch.arange(packed.total, device=packed.indices.device)
    numbers = torch.bucketize(tokens, packed.cu_seqlens[1:].long(), right=True) + 1
    if plan.across:
        numbers = numbers.view(1, -1)
    else:
        padded = numbers.new_zeros(packed.shape[0] * packed.shape[1])
        numbers = padded.index_copy(0, packed.indices, numbers).view(packed.shape)
    together = (numbers[:, :, None] == numbers[:, None, :]) & (numbers != 0)[:, None, :]
    if not plan.across and plan.packed.total < numbers.numel():  # stock lets padding look at real tokens too
        keys = (numbers != 0)[:, None, :]
        together = torch.where((numbers == 0)[:, :, None], keys, together)
    if causal:
        together = together & torch.ones_like(together[0]).tril()
    return together[:, None]


def _tag(mask: Tensor, plan: Plan) -> Tensor:
    mask._fasttune = plan  # type: ignore[attr-defined]
    return mask


def _packed_by_number(numbers: Tensor) -> PackedBatch:
    starts = torch.ones_like(numbers, dtype=torch.bool)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    first = starts.flatten().nonzero().squeeze(1).to(torch.int32)
    offsets = torch.cat((first, first.new_full((1,), numbers.numel())))
    tokens = torch.arange(numbers.numel(), device=numbers.device)
    return PackedBatch(tokens, offsets, int(offsets.diff().max()), (numbers.shape[0], numbers.shape[1]))
