"""Logits that nobody reads: the cross-entropy of promised logits is computed without them, on the labelled rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttune import ops
from fasttune.ops.packing import places
from fasttune.patching.promises.source import MappedRows, RowSource, TensorRows
from fasttune.patching.promises.tensor import PromisedRows, State


class LinearRows(MappedRows):
    """Rows of linear(source): logits. select: whether rows without a label are left out; note: told of each loss that
    was computed without them."""

    def __init__(
        self,
        source: RowSource,
        weight: Tensor,
        bias: Tensor | None,
        backend: str | None,
        *,
        select: bool,
        note: Callable[[], None],
    ) -> None:
        self.weight, self.bias, self.backend, self.select, self.note = weight, bias, backend, select, note
        self.statistics: list[Any] = []  # promises/statistics.py
        kind = source.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else source.dtype
        function = lambda rows, ids: F.linear(rows, weight, bias)  # noqa: E731
        super().__init__(source, function, (weight, bias), weight.shape[0], dtype)


def _cross_entropy(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if not isinstance(input, PromisedRows) or not input.untouched() or torch.compiler.is_compiling():
        return NotImplemented
    state, logits = input.state, input.state.source
    if size_average is not None or reduce is not None:
        return NotImplemented
    if target.is_floating_point() or target.shape != state.ids.shape or input.dim() != 2:
        return NotImplemented
    if not isinstance(logits, LinearRows):
        smoothing = {"label_smoothing": label_smoothing}
        return of_labelled(F.cross_entropy, input, target, weight, ignore_index, reduction, **smoothing)
    logits.weights.check()
    logits.note()
    labelled = None
    rows_of_hidden = State(logits.source, state.ids, logits.source.dtype, state.everything, state.rising)
    with logits.moment.again(), logits.weights.wanting():
        if (isinstance(logits.source, TensorRows) and state.everything) or not (logits.select or logits.padded):
            hidden, labels = rows_of_hidden.pick(None), target
        else:  # compute the rows that carry a label, and no others
            labelled = places(target != ignore_index)
            hidden, labels = rows_of_hidden.pick(state.ids[labelled.cpu()]), target[labelled]
    with logits.moment.again(), logits.weights.wanting(), _precision(logits, input.dtype, hidden.dtype):
        loss = ops.linear_cross_entropy(
            hidden,
            logits.weight,
            labels,
            linear_bias=logits.bias,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            backend=logits.backend,
        )
    if labelled is not None and reduction == "none":
        loss = loss.new_zeros(target.shape).index_copy(0, labelled, loss)
    if not torch.is_autocast_enabled(input.device.type):  # which may be another than when the logits were promised
        loss = loss.to(input.dtype)
    options: dict[str, Any] = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    return tapped(loss, input, lambda values: F.cross_entropy(values, target, reduction=reduction, **options), target)


def of_labelled(
    function: Callable[..., Tensor],
    input: PromisedRows,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    **more: Any,
) -> Any:
    """torch's loss of promised rows (R, C), of those that have a label: logits of a few classes, mostly."""
    state = input.state
    if not getattr(state.source, "select", True) or not state.rising or not state.source.moment.gradient:
        return NotImplemented  # in evaluation somebody will look at all logits
    labelled = places(target != ignore_index)
    if labelled.numel() in (0, target.numel()):
        return NotImplemented
    options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction, **more}
    rows = state.pick(state.ids[labelled.cpu()]).to(input.dtype)
    loss = function(rows, target[labelled], **options)
    if reduction == "none":
        loss = loss.new_zeros(target.shape).index_copy(0, labelled, loss)
    return tapped(loss, input, lambda values: function(values, target, **options), target)


def tapped(result: Tensor, promised: PromisedRows, function: Callable[[Tensor], Tensor], *saved: Tensor) -> Tensor:
    """A result that was computed without the values of a promised tensor, with an edge to it; function(values) computes
    the same from them. saved: what else it uses of the caller's, that autograd notices if it is written to."""
    if not result.requires_grad or promised.own_node is None:
        return result
    promised.state.note("used")
    tap: Tensor = _Tap.apply(result, promised, promised.state, function, *saved)
    return tap


class _Tap(torch.autograd.Function):
    """If somebody asked for the promised tensor's gradient, it is computed and goes there, and on from there; else
    straight to what the result was computed from."""

    @staticmethod
    def forward(
        ctx: Any, result: Tensor, promised: Tensor, state: State, function: Callable[[Tensor], Tensor], *saved: Tensor
    ) -> Tensor:
        ctx.state, ctx.function = state, function
        ctx.save_for_backward(*saved)
        return result.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        unused = (None,) * (2 + len(ctx.saved_tensors))
        if not any(state.watched for state in ctx.state.chain()):
            return grads[0], None, *unused
        values = ctx.state.materialize().detach().requires_grad_()
        with torch.enable_grad():
            result = ctx.function(values)
        return None, torch.autograd.grad(result, values, grads[0])[0], *unused


def _precision(logits: LinearRows, dtype: torch.dtype, hidden_dtype: torch.dtype) -> AbstractContextManager[Any]:
    """16-bit logits that were cast to float32 before the loss have a float32 loss; the operation returns that under
    autocast, which changes nothing else about inputs that are 16-bit already."""
    moment = logits.moment
    if dtype == torch.float32 and hidden_dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(moment.kind, dtype=hidden_dtype)
    return torch.autocast(moment.kind, dtype=moment.dtype, enabled=moment.autocast)


PromisedRows.handlers[F.cross_entropy] = _cross_entropy
