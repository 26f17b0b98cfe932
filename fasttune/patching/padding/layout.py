"""Who attends to whom in a batch, as sequences of real tokens, recognised from the mask that a layer is handed.

Nothing is assumed about where the mask came from: a two-dimensional mask that Transformers expanded, one that a hook
narrowed, position ids that start anew, somebody's own. Its values are compared with those of a few patterns; what fits
none of them has no layout, and attention under it runs as stock does.

padding      every query sees the real keys of its row (or, causal, those up to itself)
window       of these, the keys in columns no further than a window from its own; the real tokens stand side by side
sequences    several sequences side by side in a row, causal within each
both real    a query sees a key where both are real (DeBERTa's; the mask counts as true where it is not 0)

Shape legend: mask (B, 1, S, S) bool, True where a query may look at a key, or additive (0 there, the dtype's minimum
elsewhere); B rows of S tokens, T of them real; ids number the B * S tokens row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from fasttune.ops.packing import PackedBatch

_ATTRIBUTE = "_fasttune_layout"
_P = ParamSpec("_P")
_T = TypeVar("_T")


def for_later(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Layouts are remembered: one that was made in inference mode may serve training, which saves its tensors."""

    @wraps(function)
    def ordinary(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return ordinary


@dataclass(frozen=True, eq=False)
class Layout:
    """packed: the real tokens, sequence by sequence. causal: whether a token sees only those up to itself.
    real: bool (B, S) on the CPU, None if all tokens are. window: how far from its own position a token sees, None
    without such a limit. blind_sees_all: a token at padding sees no key, and so, its scores being all the same, each
    column of its row alike, those at padding too."""

    packed: PackedBatch
    causal: bool
    real: Tensor | None = None
    window: int | None = None
    blind_sees_all: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape

    @property
    def total(self) -> int:
        """T, the number of real tokens."""
        return self.packed.total

    @property
    def full(self) -> bool:
        return self.real is None

    @cached_property
    @for_later
    def real_ids(self) -> Tensor:
        """int64 (T,) on the CPU: the numbers of the real tokens, in the packed order."""
        return torch.arange(self.total) if self.real is None else self.real.flatten().nonzero().squeeze(1)

    @cached_property
    @for_later
    def places(self) -> Tensor:
        """int64 (B * S,) on the CPU: which of the T packed rows a token is, -1 at padding."""
        return self.packed.packed_rows.cpu()

    @cached_property
    @for_later
    def lengths(self) -> Tensor:
        """int64 (N,) on the CPU: real tokens of each sequence."""
        return self.packed.cu_seqlens.cpu().diff().long()

    @cached_property
    @for_later
    def seen(self) -> Tensor:
        """int64 (B * S,) on the CPU: how many real keys of its row a token at padding sees."""
        assert self.real is not None
        if self.causal:
            return self.real.cumsum(1).flatten()
        return self.real.sum(1, keepdim=True).expand(self.shape).flatten()

    def row_mates(self, ids: Tensor, *, real: bool) -> Tensor:
        """int64, rising: all tokens of the rows of tokens ids (R,), or those at padding alone. On the CPU."""
        assert self.real is not None
        chosen = torch.zeros(self.shape[0], 1, dtype=torch.bool)
        chosen[ids // self.shape[1]] = True
        return (chosen.expand(self.shape) if real else chosen & ~self.real).flatten().nonzero().squeeze(1)

    @cached_property
    def side_by_side(self) -> bool:
        """Whether the real tokens of a row stand side by side: then packed ones are as far apart as their columns."""
        if self.real is None:
            return True
        starts = (self.real.int().diff(dim=1) > 0).sum(1) + self.real[:, 0]
        return not bool((starts > 1).any())

    @cached_property
    @for_later
    def begins(self) -> Tensor:
        """int64 (B,) on the CPU: the column of each row's first real token."""
        assert self.real is not None
        return self.real.int().argmax(1)

    @cached_property
    @for_later
    def blind(self) -> bool:
        """Whether a token at padding sees no key at all, nor all."""
        if self.real is None or self.blind_sees_all:
            return False
        if self.window is None:
            return bool(((self.seen == 0) & ~self.real.flatten()).any())
        place = torch.arange(self.shape[1]) - self.begins[:, None]
        sees = (place - self.window < self.lengths[:, None]) & (place >= (0 if self.causal else -self.window))
        return not bool((sees & (self.lengths > 0)[:, None]).all())


@lru_cache(maxsize=64)
@for_later
def unpadded(shape: tuple[int, int], device: torch.device, causal: bool) -> Layout:
    """Of a batch without padding, one sequence in each row."""
    rows, length = shape
    offsets = torch.arange(rows + 1, dtype=torch.int32) * length
    ids = torch.arange(rows * length)
    return Layout(PackedBatch(ids.to(device), offsets.to(device), length, shape), causal)


def layout_of(
    mask: Tensor | None,
    shape: tuple[int, int],
    device: torch.device,
    *,
    causal: bool,
    window: int | None = None,
    both_real: bool = False,
) -> Layout | None:
    """The layout that a mask of self-attention stands for; causal: what no mask stands for; window: the one that the
    mask may show; both_real: it may show this pattern alone. None: no known pattern."""
    if mask is None:
        return unpadded(shape, device, causal)
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[-2:] != (shape[1], shape[1]) or 0 in shape:
        return None
    if mask.shape[0] not in (1, shape[0]) or mask.requires_grad:
        return None
    known = getattr(mask, _ATTRIBUTE, None)
    version = None if mask.is_inference() else mask._version
    asked = (version, shape, window, both_real)
    if known is not None and version is not None and known[0] == asked:
        found: Layout | None = known[1]
        return found
    found = _both_real(mask, shape) if both_real else _recognised(mask, shape, window)
    setattr(mask, _ATTRIBUTE, (asked, found))
    return found


def _both_real(mask: Tensor, shape: tuple[int, int]) -> Layout | None:
    visible = mask.detach()[:, 0].bool().expand(shape[0], -1, -1)
    real = visible.diagonal(dim1=1, dim2=2)
    if not torch.equal(visible, real[:, :, None] & real[:, None]):
        return None
    layout = _padded(real.cpu(), mask.device, causal=False)
    return layout if layout.full else replace(layout, blind_sees_all=True)


def _recognised(mask: Tensor, shape: tuple[int, int], window: int | None) -> Layout | None:
    device, mask = mask.device, mask.detach()[:, 0].cpu()  # the one time that the host waits for a GPU
    visible = mask if mask.dtype == torch.bool else mask == 0
    hidden_is_hidden = True
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            return None
        lowest = torch.finfo(mask.dtype).min
        hidden_is_hidden = bool((visible | (mask == lowest)).all())
    if not hidden_is_hidden:
        return None
    visible = visible.expand(shape[0], -1, -1)
    last = visible[:, -1]  # what the last query sees
    if bool((visible == last[:, None]).all()):
        return _padded(last, device, causal=False)
    triangle = torch.ones(shape[1], shape[1], dtype=torch.bool).tril()
    if bool((visible == (last[:, None] & triangle)).all()):
        return _padded(last, device, causal=True)
    tokens = torch.arange(shape[1])
    if window is not None:
        distance, keys = tokens - tokens[:, None], visible.any(1)
        for causal in (False, True):
            near = (distance.abs() <= window) & ((distance <= 0) if causal else (distance == distance))
            if bool((visible == (keys[:, None] & near)).all()):
                return _windowed(keys, device, causal, window)
    starts = visible.int().argmax(-1) == tokens  # the first key that a query sees is its own token
    number = starts.cumsum(1)
    together = (number[:, :, None] == number[:, None, :]) & starts[:, :1, None]
    for causal in (True, False):
        if bool((visible == (together & triangle if causal else together)).all()):
            return _side_by_side(starts, shape, device, causal=causal)
    return None


@for_later
def _padded(real: Tensor, device: torch.device, *, causal: bool) -> Layout:
    if bool(real.all()):
        return unpadded((real.shape[0], real.shape[1]), device, causal)
    packed = PackedBatch.from_mask(real)
    if device.type != "cpu":
        indices, offsets = packed.indices.to(device), packed.cu_seqlens.to(device)
        packed = PackedBatch(indices, offsets, packed.max_seqlen, packed.shape)
    return Layout(packed, causal, real.clone())


def _windowed(real: Tensor, device: torch.device, causal: bool, window: int) -> Layout | None:
    layout = replace(_padded(real, device, causal=causal), window=window)
    return layout if layout.side_by_side else None


@for_later
def _side_by_side(starts: Tensor, shape: tuple[int, int], device: torch.device, *, causal: bool) -> Layout:
    """starts (B, S): where a sequence begins; a row's first token does."""
    begin = starts.flatten().nonzero().squeeze(1).to(torch.int32)
    offsets = torch.cat((begin, begin.new_full((1,), starts.numel())))
    longest = int(offsets.diff().max())
    ids = torch.arange(starts.numel(), device=device)
    return Layout(PackedBatch(ids, offsets.to(device), longest, shape), causal)
