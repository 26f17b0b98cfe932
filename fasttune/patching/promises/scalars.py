"""PromisedScalars: one number of each row, (*lead,), computed when somebody reads it: a log-probability, say.

They are promised rows of one feature without the last dimension. What losses do to them is understood: views, indices,
masks, numbers times them. Anything else gets all of them, as an ordinary tensor in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttune.patching.promises.on_demand import OnDemand
from fasttune.patching.promises.origins import TOO_LATE
from fasttune.patching.promises.source import RowSource
from fasttune.patching.promises.tensor import PromisedRows, materialized, positional


class PromisedScalars(OnDemand):
    """rows (*lead, 1) as (*lead,)."""

    rows: PromisedRows
    value: Tensor | None
    lent: bool  # whether something was made of some of them already

    @staticmethod
    def of(rows: PromisedRows) -> PromisedScalars:
        with torch._C.DisableTorchFunctionSubclass():
            scalars: PromisedScalars = _Squeeze.apply(rows) if torch.is_grad_enabled() else _wrapper(rows)
        scalars.rows, scalars.value, scalars.lent = rows, None, False
        return scalars

    def materialize(self) -> Tensor:
        if self.value is None:
            with torch.set_grad_enabled(self.rows.state.source.moment.gradient):
                self.value = self.rows.materialize().squeeze(-1)
        return self.value

    def untouched(self) -> bool:
        return self.value is None and self.rows.untouched()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in PromisedRows.metadata:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = cls.handlers.get(func)
        args, kwargs = positional(args, kwargs)
        scalars = args[0] if args else None
        if handler is not None and isinstance(scalars, cls) and scalars.untouched() and kwargs.get("out") is None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                scalars.lent = scalars.lent or result is not scalars
                return result
        if func in _GRADIENTS and any(isinstance(arg, cls) and arg.lent for arg in args):
            raise RuntimeError(TOO_LATE)
        args, kwargs = _ready(args), _ready(kwargs)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Below autograd: gradients go through the tensor's own node.
        return func(*_ready(args, detach=True), **_ready(kwargs or {}, detach=True))

    handlers: ClassVar[dict[Any, Callable[..., Any]]] = {}


class _Squeeze(torch.autograd.Function):
    """The node of the scalars, for whoever takes them without asking Python."""

    @staticmethod
    def forward(ctx: Any, rows: PromisedRows) -> Tensor:
        return _wrapper(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].unsqueeze(-1)


def _wrapper(rows: PromisedRows) -> PromisedScalars:
    scalars: PromisedScalars = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        PromisedScalars, rows.shape[:-1], dtype=rows.dtype, device=rows.device
    )
    scalars.rows, scalars.value, scalars.lent = rows, None, False
    return scalars


def _ready(value: Any, *, detach: bool = False) -> Any:
    """Ordinary tensors for all promises in a value."""
    if isinstance(value, PromisedScalars):
        return value.materialize().detach() if detach else value.materialize()
    if isinstance(value, dict):
        return {key: _ready(item, detach=detach) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_ready(item, detach=detach) for item in value)
    return materialized(value)


def squeezed(rows: Any) -> Any:
    """(*lead, 1) as (*lead,): promised rows as promised scalars."""
    if isinstance(rows, PromisedRows):
        return PromisedScalars.of(rows)
    return NotImplemented if rows is NotImplemented else rows.squeeze(-1)


class _Paired(RowSource):
    """function(rows of a, rows of b) at the same ids."""

    def __init__(self, a: RowSource, b: RowSource, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.a, self.b, self.function = a, b, function
        self.count, self.features, self.device, self.padded = a.count, 1, a.device, a.padded
        self.late = a.late and b.late
        self.dtype = torch.promote_types(a.dtype, b.dtype)
        self.leaves = tuple(leaf for source in (a, b) if source.moment.gradient for leaf in source.leaves)
        self._shelves_below = a.shelf(), b.shelf()
        super().__init__(())

    def anew(self) -> RowSource:
        twin: Any = super().anew()
        twin.a, twin.b = self.a.anew(), self.b.anew()
        return twin

    def told(self, reader: str) -> None:
        self.a.told(reader)

    def check(self, ids: Tensor | None) -> None:
        self.a.check(ids)
        self.b.check(ids)

    def compute(self, ids: Tensor | None) -> Tensor:
        return self.function(self.a.rows(ids), self.b.rows(ids))


def _paired(function: Callable[[Tensor, Tensor], Tensor], a: PromisedScalars, b: PromisedScalars) -> Any:
    """function of two numbers of each row."""
    first, second = a.rows.state, b.rows.state
    if not b.untouched() or not (first.rising and second.rising) or not torch.equal(first.ids, second.ids):
        return NotImplemented
    if first.source.dtype != first.dtype or second.source.dtype != second.dtype:
        return NotImplemented
    if first.source.count != second.source.count:
        return NotImplemented
    b.lent = True
    second.note("lent")
    return squeezed(a.rows.with_source(_Paired(first.source, second.source, function)))


def _arithmetic(function: Callable[..., Any]) -> Callable[..., Any]:
    """With a number, or with another promise of the same rows."""
    alone = _through(function)

    def handler(scalars: PromisedScalars, other: Any, **kwargs: Any) -> Any:
        if not isinstance(other, PromisedScalars):
            return alone(scalars, other, **kwargs)
        return NotImplemented if kwargs else _paired(function, scalars, other)

    return handler


def _through(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of the rows, called with numbers and strings beside them."""

    def handler(scalars: PromisedScalars, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, (Tensor, tuple, list)) for x in (*args, *kwargs.values())):
            return NotImplemented
        return squeezed(scalars.rows.mapped(lambda rows, ids: function(rows, *args, **kwargs)))

    return handler


def _cast(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda scalars, *args, **kwargs: squeezed(function(scalars.rows, *args, **kwargs))


def _view(scalars: PromisedScalars, *shape: Any) -> Any:
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if not sizes or not all(type(size) is int for size in sizes) or scalars.numel() == 0:
        return NotImplemented
    return squeezed(scalars.rows.view(*sizes, 1))


def _masked_fill(scalars: PromisedScalars, mask: Tensor, value: Any) -> Any:
    if isinstance(mask, OnDemand) or mask.dim() == 0:
        return NotImplemented
    return squeezed(scalars.rows.masked_fill(mask.unsqueeze(-1), value))


def _masked_fill_(scalars: PromisedScalars, mask: Tensor, value: Any) -> Any:
    if scalars.lent or (filled := _masked_fill(scalars, mask, value)) is NotImplemented:
        return NotImplemented
    scalars.value = filled
    return scalars


def _mul(scalars: PromisedScalars, other: Any) -> Any:
    """By a number, or by a mask: rows where it is zero are not computed."""
    if isinstance(other, (int, float)):
        return squeezed(scalars.rows * other)
    if isinstance(other, PromisedScalars):
        return _paired(torch.mul, scalars, other)
    if not isinstance(other, Tensor) or isinstance(other, OnDemand) or other.dim() == 0 or other.requires_grad:
        return NotImplemented
    if other.shape != scalars.shape:
        return NotImplemented
    return squeezed(scalars.rows * other.unsqueeze(-1))


def _getitem(scalars: PromisedScalars, index: Any) -> Any:
    items = index if isinstance(index, tuple) else (index,)
    if any(item is Ellipsis for item in items):
        return NotImplemented
    found = scalars.rows[index]
    return squeezed(found) if found.dim() and found.shape[-1] == 1 else NotImplemented


def _unsqueeze(scalars: PromisedScalars, dim: int) -> Any:
    return scalars.rows if dim in (-1, scalars.dim()) else NotImplemented


def _squeeze(scalars: PromisedScalars, dim: Any = None) -> Any:
    known = type(dim) is int and -scalars.dim() <= dim < scalars.dim() and scalars.shape[dim] != 1
    return scalars if known else NotImplemented


def _squeeze_rows(rows: Any, dim: Any = None) -> Any:
    """The only feature's dimension."""
    if not isinstance(rows, PromisedRows) or not rows.untouched() or rows.shape[-1] != 1 or not rows.state.rising:
        return NotImplemented
    return squeezed(rows) if type(dim) is int and dim in (-1, rows.dim() - 1) else NotImplemented


_GRADIENTS = {Tensor.register_hook, Tensor.retain_grad}
_ELEMENTWISE = (
    *(Tensor.neg, torch.neg, Tensor.__neg__, Tensor.exp, torch.exp, Tensor.log, torch.log, F.logsigmoid),
    *(Tensor.square, torch.square, Tensor.__rsub__, Tensor.__radd__, Tensor.clamp, torch.clamp, torch.sigmoid),
    *(Tensor.sigmoid, Tensor.pow, Tensor.__pow__, torch.pow),
)
_ARITHMETIC = (
    *(Tensor.add, Tensor.__add__, torch.add, Tensor.sub, Tensor.__sub__, torch.sub),
    *(Tensor.div, Tensor.__truediv__, torch.div),
)
_CASTS = (Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16)

_OWN: dict[Any, Callable[..., Any]] = {
    **{function: _through(function) for function in _ELEMENTWISE},
    **{function: _cast(function) for function in _CASTS},
    **{function: _arithmetic(function) for function in _ARITHMETIC},
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _view),
    **dict.fromkeys((Tensor.masked_fill, torch.masked_fill), _masked_fill),
    Tensor.masked_fill_: _masked_fill_,
    **dict.fromkeys((Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__), _mul),
    Tensor.__getitem__: _getitem,
    **dict.fromkeys((Tensor.unsqueeze, torch.unsqueeze), _unsqueeze),
    **dict.fromkeys((Tensor.squeeze, torch.squeeze), _squeeze),
    Tensor.contiguous: lambda scalars: scalars,
}
PromisedScalars.handlers |= _OWN
PromisedRows.handlers |= dict.fromkeys((Tensor.squeeze, torch.squeeze), _squeeze_rows)
