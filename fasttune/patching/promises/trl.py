"""The fused head of TRL's trainers (trl.trainer.utils.add_fused_lm_head): log-probability, entropy, mean logit and
top-1 of each next token.

It scores every position and then fills in zeros where the label is ignored. What it is handed by a patched model is a
promise, so its function answers with promises, and the fill tells which rows were needed. It gets its tensors by
`Function.apply`, which no tensor subclass sees: the function's name in that module is bound to `FusedHead`, which hands
on to it whatever is not a promise.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor

from fasttune.patching.promises.reductions import in_range, table_of
from fasttune.patching.promises.scalars import PromisedScalars
from fasttune.patching.promises.source import MappedRows
from fasttune.patching.promises.statistics import ENTROPY, LOG_PROB, MEAN_LOGIT, TOP1, Statistics
from fasttune.patching.promises.tensor import PromisedRows

_MODULE, _NAME = "trl.trainer.utils", "_ChunkedLogProbFunction"
_KNOWN = {"entropy", "mean_logits", "is_top1", "log_probs"}
_ARGUMENTS = (
    *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)


def recognise() -> None:
    """Binds the name, once TRL is imported, if its function takes the arguments that are known here."""
    module: Any = sys.modules.get(_MODULE)
    stock = getattr(module, _NAME, None)
    if stock is None or isinstance(stock, FusedHead) or getattr(module, "_fasttune_unknown", False):
        return
    if tuple(inspect.signature(stock.forward).parameters) == _ARGUMENTS:
        setattr(module, _NAME, FusedHead(stock))
    else:
        module._fasttune_unknown = True


class FusedHead:
    """`apply` of TRL's ChunkedLogProbFunction."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stock, name)

    def apply(
        self,
        hidden: Any,
        weight: Any,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> Any:
        """hidden (N, C), weight (V, C), targets (N,): (log_prob, entropy, None, mean_logit, is_top1) of each row, None
        where not in outputs."""
        if not _known(hidden, weight, bias, targets) or softcap is not None or not set(outputs) <= _KNOWN:
            rest = (softcap, logit_scale, outputs)
            return self.stock.apply(hidden, weight, bias, targets, temperature, chunk_size, *rest)
        table = table_of(hidden, targets[:, None])[:, 0]
        source = hidden.state.source
        scale = logit_scale / temperature
        found = Statistics(source, source.head_weight(weight), bias, None, scale=scale, labels=table)

        def top1(rows: Tensor, ids: Tensor | None) -> Tensor:
            return rows[:, TOP1 : TOP1 + 1] == found.labels_at(ids)[:, None]  # type: ignore[index]

        def column(place: int) -> Any:
            return lambda rows, ids: rows[:, place : place + 1]

        def mean_logit(rows: Tensor, ids: Tensor | None) -> Tensor:
            return rows.detach()[:, MEAN_LOGIT : MEAN_LOGIT + 1]

        def scalars(name: str, function: Any, dtype: torch.dtype = torch.float32) -> PromisedScalars | None:
            if name != "log_probs" and name not in outputs:
                return None
            return PromisedScalars.of(hidden.with_source(MappedRows(found, function, (), 1, dtype)))

        return (
            scalars("log_probs", column(LOG_PROB)),
            scalars("entropy", column(ENTROPY)),
            None,
            scalars("mean_logits", mean_logit),
            scalars("is_top1", top1, torch.bool),
        )


def _known(hidden: Any, weight: Any, bias: Any, targets: Tensor) -> bool:
    if not isinstance(hidden, PromisedRows) or not hidden.untouched() or torch.compiler.is_compiling():
        return False
    state, device = hidden.state, hidden.device
    if hidden.dim() != 2 or not state.rising or state.dtype != state.source.dtype or weight.device != device:
        return False
    if not all(type(x) in (Tensor, torch.nn.Parameter) for x in (weight, bias) if x is not None):
        return False
    if not getattr(state.source, "select", True):
        return False
    return targets.shape == state.ids.shape and targets.device == device and in_range(targets, weight.shape[0])
