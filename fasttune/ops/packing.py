"""Packing: the real tokens of a padded batch, side by side. Nothing that padding would cost is computed in between.

A padded batch (B, S, ...) with a 0/1 mask becomes (T, ...), T = number of ones, in row-major order; each sequence's
tokens keep their order, so that causal attention within a sequence means the same. `PackedBatch` knows the way back.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _backends, _transforms, _triton
from fasttune.ops._checks import check_device, check_shape, check_tensor, describe
from fasttune.ops._indices import check_integers
from fasttune.ops._operator import Operator

# Shape legend: mask (B, S); rows (B * S, ...); packed (T, ...); indices (T,) int64, the flat row of each packed token.


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Where the tokens of a packed batch come from and where its sequences begin.

    indices: int64 (T,), strictly increasing: the flat row b * S + s of each token. It is also the token's logical row
        for dropout (`row_ids`), so that packing does not change which elements are dropped.
    cu_seqlens: int32 (N + 1,), cumulative sequence lengths; cu_seqlens[-1] == T.
    max_seqlen: the longest sequence, a Python integer.
    shape: (B, S) of the padded batch.
    """

    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    shape: tuple[int, int]

    @staticmethod
    def from_mask(attention_mask: Tensor, *, total: int | None = None, longest: int | None = None) -> PackedBatch:
        """From a mask (B, S), bool or 0/1 of any dtype: one sequence per row.

        total, longest: the number of ones, and of those in the row that has most. Where they are not given they are
        read back from a GPU.

        Raises ValueError unless the mask has two dimensions, TypeError unless it is a tensor.
        """
        check_tensor("pack", "attention_mask", attention_mask)
        if attention_mask.dim() != 2:
            raise ValueError(
                f"pack: attention_mask is {describe(attention_mask)}; expected a 0/1 mask of shape (B, S)."
            )
        _check_readable("attention_mask", attention_mask, total, longest)
        real = attention_mask != 0
        lengths = real.sum(1, dtype=torch.int32)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        if longest is None:
            longest = int(lengths.max()) if lengths.numel() else 0
        return PackedBatch(places(real, total), cu_seqlens, longest, (real.shape[0], real.shape[1]))

    @staticmethod
    def from_position_ids(
        position_ids: Tensor, *, sequences: int | None = None, longest: int | None = None
    ) -> PackedBatch:
        """From position ids (B, S) that restart at 0 wherever a sequence begins: every token is real, and each row is
        cut at its restarts (what DataCollatorWithFlattening produces, B = 1).

        sequences, longest: how many there are, and the length of the longest. Where they are not given they are read
        back from a GPU.

        Raises ValueError unless position_ids has two dimensions.
        """
        check_tensor("pack", "position_ids", position_ids)
        if position_ids.dim() != 2:
            raise ValueError(f"pack: position_ids is {describe(position_ids)}; expected shape (B, S).")
        _check_readable("position_ids", position_ids, sequences, longest)
        first = places(sequence_starts(position_ids), sequences).to(torch.int32)
        total = torch.full((1,), position_ids.numel(), dtype=torch.int32, device=position_ids.device)
        cu_seqlens = torch.cat((first, total)) if position_ids.numel() else total
        if longest is None:
            longest = int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0
        indices = torch.arange(position_ids.numel(), device=position_ids.device)
        return PackedBatch(indices, cu_seqlens, longest, (position_ids.shape[0], position_ids.shape[1]))

    @cached_property
    def packed_rows(self) -> Tensor:
        """int64 (B * S,): the packed row of each padded row, -1 at padding."""
        rows = torch.full((self.shape[0] * self.shape[1],), -1, dtype=torch.int64, device=self.indices.device)
        rows[self.indices] = torch.arange(self.indices.numel(), device=self.indices.device)
        return rows

    @property
    def total(self) -> int:
        """T, the number of real tokens."""
        return self.indices.numel()

    @property
    def is_full(self) -> bool:
        """Whether there is no padding at all."""
        return self.total == self.shape[0] * self.shape[1]


def _check_readable(name: str, tensor: Tensor, *counts: int | None) -> None:
    """Raises RuntimeError where counts would have to be read from a tensor that does not show its values."""
    if None not in counts or torch.compiler.is_compiling():
        return
    why = None
    if tensor.is_meta:
        why = "lies on the meta device"
    elif _transforms.tracing():
        why = "is being traced, and its counts would become constants"
    elif torch._C._functorch.is_batchedtensor(tensor):
        why = "is mapped over by torch.func.vmap"
    if why is not None:
        raise RuntimeError(
            f"fasttune: pack cannot read how many tokens there are from {name}, which {why}; pass a PackedBatch, or"
            " fasttune.unpatch(model) first."
        )


def sequence_starts(position_ids: Tensor) -> Tensor:
    """Bool (B, S): where a sequence begins: a row's first token, and wherever position ids (B, S) do not go on."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return starts


def places(mask: Tensor, count: int | None = None) -> Tensor:
    """mask.flatten().nonzero() as int64 (count,), rising. If told the count, a GPU's host reads nothing back."""
    flat = mask.flatten()
    if count is None:
        return flat.nonzero().squeeze(1)
    # Each one goes to the slot of its rank, all zeros to a slot behind the last.
    slots = torch.where(flat, flat.cumsum(0) - 1, count).clamp(max=count)
    found = torch.zeros(count + 1, dtype=torch.int64, device=flat.device)
    return found.scatter_(0, slots, torch.arange(flat.numel(), device=flat.device))[:count]


def _gather(rows: Tensor, indices: Tensor, count: int) -> Tensor:
    return rows.index_select(0, indices)


def _scatter(packed: Tensor, indices: Tensor, count: int) -> Tensor:
    return packed.new_zeros((count, *packed.shape[1:])).index_copy_(0, indices, packed)


def _fake_gather(rows: Tensor, indices: Tensor, count: int) -> Tensor:
    return rows.new_empty((indices.shape[0], *rows.shape[1:]))


def _fake_scatter(packed: Tensor, indices: Tensor, count: int) -> Tensor:
    return packed.new_empty((count, *packed.shape[1:]))


def _setup_context(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
    _, indices, count, backend = args
    ctx.save_for_backward(indices)
    ctx.count, ctx.backend = count, backend


def _backward_of_gather(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _scatter_rows(grad, ctx.saved_tensors[0], ctx.count, ctx.backend), None, None


def _backward_of_scatter(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _gather_rows(grad, ctx.saved_tensors[0], ctx.count, ctx.backend), None, None


# Each is the other's backward. Rows are distinct, so the gradient is a plain copy: torch's own index_select would
# accumulate with index_add, which is serial on a CPU and not deterministic on a GPU.
_gather_rows = Operator(
    "gather_rows",
    "(Tensor rows, Tensor indices, int count) -> Tensor",
    {"torch": _gather, "triton": _triton.lazy("packing", "gather_rows")},
    _fake_gather,
    setup_context=_setup_context,
    backward=_backward_of_gather,
)
_scatter_rows = Operator(
    "scatter_rows",
    "(Tensor packed, Tensor indices, int count) -> Tensor",
    {"torch": _scatter, "triton": _triton.lazy("packing", "scatter_rows")},
    _fake_scatter,
    setup_context=_setup_context,
    backward=_backward_of_scatter,
)
_backends.declare("packing", "triton")


def _copier(x: Tensor) -> str:
    """Triton where it runs; whoever asked for another backend gets torch's copies, as those have none of their own."""
    requested = os.environ.get("FASTTUNE_BACKEND") or "auto"
    return _backends.choose("packing", x, None) if requested in ("auto", "triton") else "torch"


def _composed() -> bool:
    """Whether something needs the derivatives or the records that torch's own operators have."""
    return _transforms.transformed() or _transforms.tracing()


def gather_rows(rows: Tensor, indices: Tensor) -> Tensor:
    """rows[indices] for distinct indices: (R, ...) and int64 (T,) to (T, ...). Its backward writes zeros elsewhere."""
    check_tensor("gather_rows", "rows", rows)
    check_integers("gather_rows", "indices", indices)
    if rows.dim() == 0 or indices.dim() != 1:
        raise ValueError(
            f"gather_rows: rows is {describe(rows)} and indices is {describe(indices)}; expected (R, ...) and (T,)."
        )
    if _composed():
        return _gather(rows, indices, rows.shape[0])
    return _gather_rows(rows, indices, rows.shape[0], _copier(rows))


def pack(x: Tensor, attention_mask: Tensor | PackedBatch) -> tuple[Tensor, PackedBatch]:
    """The rows of x (B, S, ...) whose mask (B, S) is not 0, as (T, ...), and the way back.

    attention_mask: a 0/1 mask, padded on the right, the left or anywhere, or the PackedBatch of an earlier call.
    Differentiable and deterministic; padding rows get gradient 0. Raises ValueError where shapes or devices differ.
    """
    batch = attention_mask if isinstance(attention_mask, PackedBatch) else PackedBatch.from_mask(attention_mask)
    check_tensor("pack", "x", x)
    if x.dim() < 2 or (x.shape[0], x.shape[1]) != batch.shape:
        raise ValueError(f"pack: x is {describe(x)}; expected shape {batch.shape} + (...), like attention_mask.")
    check_device("pack", "x", x, batch.indices.device, "attention_mask")
    return gather_rows(x.reshape(-1, *x.shape[2:]), batch.indices), batch


def unpack(packed: Tensor, batch: PackedBatch) -> Tensor:
    """The inverse of `pack`: (T, ...) to (B, S, ...), zeros at padding. Differentiable and deterministic.

    Raises ValueError if packed does not hold batch.total rows or lies on another device.
    """
    check_tensor("unpack", "packed", packed)
    if not isinstance(batch, PackedBatch):
        raise TypeError(f"unpack: batch is a {type(batch).__name__}; expected the PackedBatch that `pack` returned.")
    check_shape("unpack", "packed", packed, (batch.total, *packed.shape[1:]), "one row per real token")
    check_device("unpack", "packed", packed, batch.indices.device, "the batch")
    count = batch.shape[0] * batch.shape[1]
    if _composed():
        rows = packed.new_zeros((count, *packed.shape[1:])).index_add(0, batch.indices, packed)  # vmap knows it
    else:
        rows = _scatter_rows(packed, batch.indices, count, _copier(packed))
    return rows.view(*batch.shape, *packed.shape[1:])
