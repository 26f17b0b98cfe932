"""Reads across the features of each row, such as a softmax over classes: they become promises themselves, of one number
for each row where they reduce."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttune.patching.promises.on_demand import OnDemand
from fasttune.patching.promises.reads import Handler, _of_rows, before
from fasttune.patching.promises.scalars import squeezed
from fasttune.patching.promises.source import on
from fasttune.patching.promises.tensor import PromisedRows


def over_features(promised: Tensor, dim: Any) -> bool:
    """Whether dim is the last dimension, and no other."""
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    return type(dim) is int and dim in (-1, promised.dim() - 1)


def table_of(promised: PromisedRows, values: Tensor) -> Tensor:
    """values (*lead, K) of distinct rows as (count, K), by the numbers that rows have in their source."""
    table = values.new_zeros(promised.state.source.count, values.shape[-1])
    table[on(promised.state.ids.reshape(-1), values.device)] = values.reshape(-1, values.shape[-1])
    return table


def in_range(index: Tensor, size: int) -> bool:
    """Whether indices on a CPU are; elsewhere the device says so."""
    return index.device.type != "cpu" or index.numel() == 0 or 0 <= int(index.min()) <= int(index.max()) < size


def _log_softmax(promised: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    if not _of_rows(promised) or not over_features(promised, dim):
        return NotImplemented
    return _numbers(promised, lambda rows, ids: torch.log_softmax(rows, -1, dtype=dtype), promised.shape[-1])


def plain(handler: Handler) -> Handler:
    """torch's and Tensor's log_softmax know no _stacklevel."""
    return lambda promised, dim, dtype=None: handler(promised, dim, dtype=dtype)


def _numbers(
    promised: PromisedRows, function: Callable[[Tensor, Tensor | None], Tensor], features: int
) -> PromisedRows:
    rows = promised.mapped(function, features=features)
    rows.state.source.late = False
    return rows


def _gather(promised: Any, dim: int, index: Tensor, **_: Any) -> Any:
    if not _of_rows(promised) or not over_features(promised, dim) or isinstance(index, OnDemand):
        return NotImplemented
    if index.shape[:-1] != promised.shape[:-1] or index.device != promised.device or not promised.state.rising:
        return NotImplemented
    if index.shape[-1] == 0 or not in_range(index, promised.shape[-1]):
        return NotImplemented
    table = table_of(promised, index)
    return _numbers(
        promised,
        lambda rows, ids: rows.gather(-1, table if ids is None else table[on(ids, table.device)]),
        index.shape[-1],
    )


def _reduced(function: Callable[..., Tensor]) -> Handler:
    """For functions of (tensor, dim, keepdim, dtype=) that give one tensor."""

    def handler(promised: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
        if dim is None or not _of_rows(promised) or not over_features(promised, dim) or promised.shape[-1] == 0:
            return NotImplemented
        if set(kwargs) - {"dtype"}:
            return NotImplemented
        rows = _numbers(promised, lambda rows, ids: function(rows, -1, True, **kwargs), 1)
        return rows if keepdim else squeezed(rows)

    return handler


_REDUCTIONS = (
    *((torch.sum, Tensor.sum), (torch.mean, Tensor.mean)),
    *((torch.logsumexp, Tensor.logsumexp), (torch.amax, Tensor.amax)),
)

_OWN: dict[Any, Handler] = {
    F.log_softmax: _log_softmax,
    **dict.fromkeys((torch.log_softmax, Tensor.log_softmax), plain(_log_softmax)),
    **{name: _reduced(names[0]) for names in _REDUCTIONS for name in names},
    **dict.fromkeys((torch.gather, Tensor.gather), before(_gather, PromisedRows.handlers[torch.gather])),
}
PromisedRows.handlers |= _OWN
