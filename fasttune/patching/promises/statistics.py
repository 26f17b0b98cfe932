"""Losses of other people: what they read of each row of logits, without the logits.

log_softmax, logsumexp, gather and sums over the classes of promised logits are promised too; the few numbers that they
come to (ops.linear_log_prob) are computed once for the rows that are read, whichever of them is read first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttune import ops
from fasttune.patching.promises.loss import LinearRows, _cross_entropy, of_labelled, tapped
from fasttune.patching.promises.on_demand import OnDemand
from fasttune.patching.promises.reads import Handler, before
from fasttune.patching.promises.reductions import in_range, over_features, plain, table_of
from fasttune.patching.promises.scalars import squeezed
from fasttune.patching.promises.source import MappedRows, RowSource, on
from fasttune.patching.promises.tensor import PromisedRows

LOG_PROB, LOGSUMEXP, ENTROPY, MEAN_LOGIT, TOP1 = range(5)  # columns
NO_LABEL = -(2**40)  # what ops.linear_log_prob ignores: no index that torch would take


class Statistics(MappedRows):
    """(count, 5) numbers of each row of scale * linear(source). labels: (count,) class ids for the column LOG_PROB,
    None for none; started: whether any rows were computed."""

    def __init__(
        self,
        source: RowSource,
        weight: Tensor,
        bias: Tensor | None,
        backend: str | None,
        *,
        scale: float = 1.0,
        labels: Tensor | None = None,
    ) -> None:
        self.weight, self.bias, self.backend, self.scale, self.labels = weight, bias, backend, scale, labels
        self.started = False
        super().__init__(source, self._of_rows, (weight, bias), 5, torch.float32)

    def labels_at(self, ids: Tensor | None) -> Tensor | None:
        return self.labels if self.labels is None or ids is None else self.labels[on(ids, self.labels.device)]

    def _of_rows(self, rows: Tensor, ids: Tensor | None) -> Tensor:
        self.started = True
        found = ops.linear_log_prob(
            rows,
            self.weight,
            self.labels_at(ids),
            linear_bias=self.bias,
            scale=self.scale,
            ignore_index=NO_LABEL,
            backend=self.backend,
        )
        log_prob = torch.zeros_like(found.logsumexp) if found.log_prob is None else found.log_prob
        top1 = found.top1.to(log_prob.dtype)  # exact up to 2^24 classes
        return torch.stack((log_prob, found.logsumexp, found.entropy, found.mean_logit, top1), -1)


def columns_of(logits: Tensor, labels: Tensor | None) -> Tensor:
    """The same from logits (R, V) themselves."""
    log_p = torch.log_softmax(logits.float(), -1)
    lse = torch.logsumexp(logits.float(), -1)
    log_prob = torch.zeros_like(lse) if labels is None else log_p.gather(-1, labels[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    return torch.stack((log_prob, lse, entropy, logits.float().mean(-1), logits.argmax(-1).to(lse.dtype)), -1)


class LogProbs(MappedRows):
    """factor * log_softmax of rows of logits, factor 1 or -1."""

    def __init__(self, promised: PromisedRows, dtype: torch.dtype, factor: int = 1) -> None:
        logits = promised.state.source
        self.promised, self.factor = promised, factor

        def function(rows: Tensor, ids: Tensor | None) -> Tensor:
            return torch.log_softmax(rows.to(promised.dtype), -1, dtype=dtype) * factor

        super().__init__(logits, function, (), logits.features, dtype)
        self.late = False


def promised_logits(promised: Any) -> LinearRows | None:
    """The source of promised logits, each row once, of which nothing is computed yet."""
    if not isinstance(promised, PromisedRows) or not promised.untouched() or torch.compiler.is_compiling():
        return None
    source = promised.state.source
    ours = isinstance(source, LinearRows) and source.select and (promised.state.everything or promised.state.rising)
    return source if ours else None  # type: ignore[return-value]


def _log_probs(promised: Any) -> LogProbs | None:
    if not isinstance(promised, PromisedRows) or not promised.untouched():
        return None
    source = promised.state.source
    return source if isinstance(source, LogProbs) and promised_logits(source.promised) is not None else None


def statistics(promised: PromisedRows, logits: LinearRows, labels: Tensor | None = None) -> Statistics:
    """Of promised rows of these logits. labels (*lead, 1): a class for each of the rows."""
    table = None if labels is None else table_of(promised, labels)[:, 0]
    for known in logits.statistics:
        if table is None or (known.labels is None and not known.started):
            known.labels = known.labels if table is None else table
            return known
        if known.labels is not None and table.device.type == "cpu" and torch.equal(known.labels, table):
            return known
    made = Statistics(logits.source, logits.weight, logits.bias, logits.backend, labels=table)
    made.weights, made.leaves = logits.weights, logits.leaves  # as they were when the logits were promised
    logits.statistics.append(made)
    logits.note()
    return made


def _column(
    promised: PromisedRows,
    logits: PromisedRows,
    source: Statistics,
    weights: dict[int, float],
    dtype: torch.dtype,
) -> PromisedRows:
    """(*lead, 1): a sum of columns, each times its weight, for the rows of a promise, which is the logits themselves or
    their log-probabilities."""

    def combined(columns: Tensor) -> Tensor:
        parts = [columns[:, place : place + 1] * weight for place, weight in weights.items()]
        return sum(parts[1:], parts[0]).to(dtype)

    def function(rows: Tensor, ids: Tensor | None) -> Tensor:
        def again(values: Tensor) -> Tensor:
            flat = values.reshape(-1, values.shape[-1])
            if ids is not None:
                flat = flat[on(torch.isin(logits.state.ids.reshape(-1), ids), flat.device)]
            return combined(columns_of(flat, source.labels_at(ids)))

        return tapped(combined(rows), logits, again)

    rows = MappedRows(source, function, (), 1, dtype)
    rows.late = False
    return promised.with_source(rows)


def _log_softmax(promised: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    if promised_logits(promised) is None or not over_features(promised, dim):
        return NotImplemented
    result = _dtype(lambda rows: torch.log_softmax(rows, -1, dtype=dtype), promised)
    return promised.with_source(LogProbs(promised, result))


def _dtype(function: Callable[[Tensor], Tensor], promised: PromisedRows) -> torch.dtype:
    """Of what function makes here and now: autocast may be another than when the rows were promised."""
    return function(torch.empty(0, 1, dtype=promised.dtype, device=promised.device)).dtype


def _neg(promised: Any) -> Any:
    source = _log_probs(promised)
    if source is None:
        return NotImplemented
    return promised.with_source(LogProbs(source.promised, source.dtype, -source.factor))


def _gather(promised: Any, dim: int, index: Tensor, **_: Any) -> Any:
    """One class of each row."""
    of_probs = _log_probs(promised)
    logits = promised if of_probs is None else of_probs.promised
    source = promised_logits(logits)
    if source is None or not over_features(promised, dim) or isinstance(index, OnDemand):
        return NotImplemented
    if index.shape != (*promised.shape[:-1], 1) or index.device != promised.device:
        return NotImplemented
    if not in_range(index, source.features):
        return NotImplemented  # torch says what is wrong
    weights = {LOG_PROB: 1.0, LOGSUMEXP: 1.0} if of_probs is None else {LOG_PROB: float(of_probs.factor)}
    return _column(promised, logits, statistics(promised, source, index), weights, promised.dtype)


def _over_classes(function: Callable[..., Tensor]) -> Handler:
    """torch.sum, as label smoothing needs it, or torch.mean of log-probabilities over the classes."""

    def handler(promised: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None, **more: Any) -> Any:
        of_probs = _log_probs(promised)
        if of_probs is None or dim is None or more or not over_features(promised, dim):
            return NotImplemented
        times = float(of_probs.factor * (promised.shape[-1] if function is torch.sum else 1))
        result = _dtype(lambda rows: function(rows, -1, dtype=dtype), promised)
        return _of_classes(promised, of_probs.promised, {MEAN_LOGIT: times, LOGSUMEXP: -times}, keepdim, result)

    return handler


def _logsumexp(promised: Any, dim: Any, keepdim: bool = False, **more: Any) -> Any:
    if more or promised_logits(promised) is None or not over_features(promised, dim):
        return NotImplemented
    result = _dtype(lambda rows: torch.logsumexp(rows, -1), promised)
    return _of_classes(promised, promised, {LOGSUMEXP: 1.0}, keepdim, result)


def _of_classes(
    promised: PromisedRows, logits: PromisedRows, weights: dict[int, float], keepdim: bool, dtype: torch.dtype
) -> Any:
    source = statistics(promised, logits.state.source)  # type: ignore[arg-type]
    rows = _column(promised, logits, source, weights, dtype)
    return rows if keepdim else squeezed(rows)


def _nll_loss(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    """After log_softmax: the cross-entropy of the logits."""
    source = _log_probs(input)
    if source is None or source.factor != 1 or input.dtype != source.promised.dtype:
        plain = size_average is None and reduce is None and input.dim() == 2 and input.shape[:1] == target.shape
        if not plain or not isinstance(input, PromisedRows) or not input.untouched() or torch.compiler.is_compiling():
            return NotImplemented
        return of_labelled(F.nll_loss, input, target, weight, ignore_index, reduction)
    logits: Any = source.promised
    if not torch.equal(logits.state.ids.reshape(-1), input.state.ids.reshape(-1)):
        return NotImplemented
    return _cross_entropy(logits.view(input.shape), target, weight, size_average, ignore_index, reduce, reduction)


_OWN: dict[Any, Handler] = {
    F.log_softmax: _log_softmax,
    **dict.fromkeys((torch.log_softmax, Tensor.log_softmax), plain(_log_softmax)),
    **dict.fromkeys((torch.neg, Tensor.neg, Tensor.__neg__), _neg),
    **dict.fromkeys((torch.gather, Tensor.gather), _gather),
    **dict.fromkeys((torch.sum, Tensor.sum), _over_classes(torch.sum)),
    **dict.fromkeys((torch.mean, Tensor.mean), _over_classes(torch.mean)),
    **dict.fromkeys((torch.logsumexp, Tensor.logsumexp), _logsumexp),
    F.nll_loss: _nll_loss,
}
PromisedRows.handlers |= {function: before(own, PromisedRows.handlers.get(function)) for function, own in _OWN.items()}
