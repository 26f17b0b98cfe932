"""SPLADE: the maximum over tokens of log1p(relu(logits)), times a mask, without the logits.

Activations that rise with their argument change places with a maximum, and after a relu a masked token, which counts as
zero, is never above a real one. So real tokens' rows go through ops.linear_max, and activations through what comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttune import ops
from fasttune.patching.promises.later import Later
from fasttune.patching.promises.loss import LinearRows, tapped
from fasttune.patching.promises.on_demand import OnDemand
from fasttune.patching.promises.reads import Handler, before
from fasttune.patching.promises.source import MappedRows, on
from fasttune.patching.promises.statistics import promised_logits
from fasttune.patching.promises.tensor import PromisedRows, State


class ActivatedRows(MappedRows):
    """Rows of logits, times a mask of zeros and ones, through activations that never fall.

    kept: (count,) bool on the CPU, None for all rows. relu: whether the first activation is one.
    """

    def __init__(
        self,
        promised: PromisedRows,
        kept: Tensor | None,
        activations: tuple[Callable[[Tensor], Tensor], ...] = (),
        *,
        relu: bool = False,
    ) -> None:
        self.promised, self.kept, self.activations, self.relu = promised, kept, activations, relu
        logits, self.cast = promised.state.source, promised.dtype
        super().__init__(logits, lambda rows, ids: self.through(rows.to(self.cast)), (), logits.features, self.cast)
        self.late = False

    def compute(self, ids: Tensor | None) -> Tensor:
        if self.kept is None:
            return super().compute(ids)
        ids = torch.arange(self.count) if ids is None else ids
        places = self.kept[ids].nonzero().squeeze(1)
        rows = super().compute(ids[places])
        masked = self.through(rows.new_zeros(()))
        whole = masked.expand(ids.numel(), self.features).clone()
        return whole.index_copy(0, on(places, rows.device), rows)

    def told(self, reader: str) -> None:
        if self.kept is None:
            super().told(reader)

    def through(self, values: Tensor) -> Tensor:
        for activation in self.activations:
            values = activation(values)
        return values


def _activated(promised: Any) -> ActivatedRows | None:
    if not isinstance(promised, PromisedRows) or not promised.untouched():
        return None
    source = promised.state.source
    return source if isinstance(source, ActivatedRows) and promised_logits(source.promised) is not None else None


def _mul(a: Any, b: Any, **kwargs: Any) -> Any:
    """Logits (B, S, V) times a mask (B, S, 1)."""
    promised, mask = (a, b) if isinstance(a, PromisedRows) else (b, a)
    if kwargs or promised_logits(promised) is None or promised.device.type != "cpu":
        return NotImplemented
    if not isinstance(mask, Tensor) or isinstance(mask, OnDemand) or mask.requires_grad or mask.is_complex():
        return NotImplemented
    if mask.shape != (*promised.shape[:-1], 1) or torch.promote_types(promised.dtype, mask.dtype) != promised.dtype:
        return NotImplemented
    rows = mask.reshape(-1)
    kept = rows != 0
    if not bool((rows[kept] == 1).all()):
        return NotImplemented
    whole = torch.zeros(promised.state.source.count, dtype=torch.bool)
    whole[promised.state.ids.reshape(-1)] = kept
    return promised.with_source(ActivatedRows(promised, whole))


def _through(activation: Callable[[Tensor], Tensor], *, in_place: bool = False, relu: bool = False) -> Handler:
    """After a mask, or after another of these."""

    def handler(promised: Any, *args: Any, **kwargs: Any) -> Any:
        if args or set(kwargs) - {"inplace"} or kwargs.get("inplace"):
            return NotImplemented
        source = _activated(promised)
        if source is None:
            if not relu or promised_logits(promised) is None:
                return NotImplemented
            source = ActivatedRows(promised, None)
        state = promised.state
        first = relu and not source.activations
        rows = ActivatedRows(source.promised, source.kept, (*source.activations, activation), relu=source.relu or first)
        if not in_place:
            return promised.with_source(rows)
        if state.viewed is not None or state.derived or isinstance(state.source, LinearRows):
            return NotImplemented
        state.source, state.shelf = rows, rows.shelf()
        return promised

    return handler


def _max(promised: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """Over the tokens of (B, S, V)."""
    source = _activated(promised)
    if source is None or kwargs or type(dim) is not int or promised.dim() != 3 or dim % 3 != 1:
        return NotImplemented
    if not source.relu or 0 in promised.shape:
        return NotImplemented
    values = _over_tokens(promised, source)
    values = values.unsqueeze(1) if keepdim else values

    def indices() -> Tensor:
        with torch.no_grad():
            return torch.max(promised.materialize(), dim, keepdim)[1]

    return torch.return_types.max((values, Later.of(indices, tuple(values.shape), torch.int64, values.device)))  # type: ignore[attr-defined]


def _amax(promised: Any, dim: Any = (), keepdim: bool = False, **kwargs: Any) -> Any:
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    found = _max(promised, dim, keepdim, **kwargs)
    return found if found is NotImplemented else found[0]


def _over_tokens(promised: PromisedRows, source: ActivatedRows) -> Tensor:
    """(B, V): the maximum over the tokens that the mask keeps; relu makes 0 of a sequence without any."""
    ids, logits = promised.state.ids, source.promised.state.source
    assert isinstance(logits, LinearRows)
    kept = torch.ones_like(ids, dtype=torch.bool) if source.kept is None else source.kept[ids]
    cu_seqlens = F.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    logits.weights.check()
    logits.note()
    hidden_rows = State(logits.source, ids, logits.source.dtype, promised.state.everything, promised.state.rising)
    with logits.moment.again(), logits.weights.wanting():
        hidden = hidden_rows.pick(None if bool(kept.all()) else ids[kept])
        largest = ops.linear_max(hidden, logits.weight, cu_seqlens, linear_bias=logits.bias, backend=logits.backend).to(
            promised.dtype
        )
        values = source.through(largest)
    promised.state.note("lent")
    at = None if promised.state.everything else torch.isin(source.promised.state.ids.reshape(-1), ids.reshape(-1))

    def again(everything: Tensor) -> Tensor:
        flat = everything.reshape(-1, everything.shape[-1])
        rows = (flat if at is None else flat[at]).view(*ids.shape, -1)
        return source.through(rows.masked_fill(~kept[..., None], 0.0)).max(1).values

    return tapped(values, source.promised, again)


_OWN: dict[Any, Handler] = {
    **dict.fromkeys((Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__), _mul),
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _through(torch.relu, relu=True)),
    **dict.fromkeys((torch.relu_, Tensor.relu_), _through(torch.relu, in_place=True, relu=True)),
    **dict.fromkeys((torch.log1p, Tensor.log1p), _through(torch.log1p)),
    Tensor.log1p_: _through(torch.log1p, in_place=True),
    **dict.fromkeys((torch.max, Tensor.max), _max),
    **dict.fromkeys((torch.amax, Tensor.amax), _amax),
}
PromisedRows.handlers |= {function: before(own, PromisedRows.handlers.get(function)) for function, own in _OWN.items()}
