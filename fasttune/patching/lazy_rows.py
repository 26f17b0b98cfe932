"""Tensors whose rows are computed when somebody reads them.

A head reads few rows of the last hidden state: a classifier one per sequence, a language-model loss the labelled ones.
Instead of telling the last layer in advance, the last layer (and the modules after it) return a `LazyRows`: a tensor of
the right shape, dtype and device that holds a `RowSource`, which can compute any set of rows. Indexing, slicing and
reshaping that keep the last dimension only move row numbers around; the first operator that needs values computes the
rows asked for and no others; `F.cross_entropy` of lazy logits becomes `ops.linear_cross_entropy` on the labelled rows.
Anything else sees exactly what stock would have computed, forward and backward.

Shape legend: a LazyRows is (*lead, features); ids (*lead) int64 holds the source's row number of each row.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttune import ops
from fasttune.ops.packing import gather_rows, places
from fasttune.patching.rows import IGNORED, labelled_rows
from fasttune.patching.state import reading_waits


class RowSource:
    """Rows of one (count, features) matrix, computed on request, any number of times, always the same values."""

    features: int
    dtype: torch.dtype
    device: torch.device
    select = True  # whether rows that nobody reads are left out; to find them a GPU has to tell their number

    def __init__(self, parameters: Iterable[Tensor | None]) -> None:
        self._parameters = [(p, p._version, p.data_ptr()) for p in parameters if p is not None]
        kind = self.device.type
        self._autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        self._with_gradient = torch.is_grad_enabled()

    def rows(self, ids: Tensor | None) -> Tensor:
        """(len(ids), features) for row numbers that rise (see pick_rows), or all rows in order for None."""
        self.check_unchanged()
        with self.same_autocast(), torch.set_grad_enabled(self._with_gradient):
            return self._rows(ids)

    def _rows(self, ids: Tensor | None) -> Tensor:
        raise RuntimeError(f"{type(self).__name__} does not say how to compute its rows.")

    def same_autocast(self) -> AbstractContextManager[Any]:
        """Autocast as it was when the rows were promised, wherever they are read."""
        enabled, dtype = self._autocast
        return torch.autocast(self.device.type, dtype=dtype, enabled=enabled)

    def check_unchanged(self) -> None:
        """Raises RuntimeError if a weight was written since: the values of the forward pass are gone then."""
        for parameter, version, address in self._parameters:
            if parameter._version != version or parameter.data_ptr() != address:
                raise RuntimeError(
                    "These values were not computed during the forward pass, because nothing had read them, and the"
                    " weights they depend on have changed since (an optimizer step?). Read them before the step, or"
                    " patch with fasttune.patch(model, loss=False, trim=False) to have them computed always."
                )


class TensorRows(RowSource):
    """Rows of a tensor that exists."""

    def __init__(self, tensor: Tensor) -> None:
        self.features, self.dtype, self.device = tensor.shape[-1], tensor.dtype, tensor.device
        self._matrix = tensor.reshape(-1, tensor.shape[-1])
        super().__init__(())

    def _rows(self, ids: Tensor | None) -> Tensor:
        return self._matrix if ids is None else take_rows(self._matrix, ids)


class MappedRows(RowSource):
    """function(module, rows) of another source's rows: a LayerNorm, a head's transform."""

    def __init__(
        self,
        source: RowSource,
        module: nn.Module,
        function: Callable[[Any, Tensor], Tensor],
        features: int,
        dtype: torch.dtype,
    ) -> None:
        self.source, self.module, self.function = source, module, function
        self.features, self.dtype, self.device = features, dtype, source.device
        super().__init__(module.parameters())

    def _rows(self, ids: Tensor | None) -> Tensor:
        return self.function(self.module, self.source.rows(ids))


class LinearRows(RowSource):
    """Rows of linear(source): logits. Their cross-entropy, on `backend`, is computed without them; `note` is told where
    they are read."""

    note: Callable[[str], None] | None = None
    backend: str | None = None

    def __init__(self, source: RowSource, weight: Tensor, bias: Tensor | None) -> None:
        self.source, self.weight, self.bias = source, weight, bias
        self.features, self.device = weight.shape[0], source.device
        kind = self.device.type
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else source.dtype
        super().__init__((weight, bias))

    def _rows(self, ids: Tensor | None) -> Tensor:
        if self.note is not None:
            self.note("logits were read")
        return F.linear(self.source.rows(ids), self.weight, self.bias)


class LazyRows(Tensor):
    """See the top of this file. Make one with `LazyRows.of(source, lead)`."""

    source: RowSource
    ids: Tensor
    everything: bool  # ids are 0, 1, 2, ...: all rows in order
    rising: bool  # ids rise: rows were left out, none was repeated or moved
    value: Tensor | None
    viewed: LazyRows | None  # the tensor whose view stock would have returned

    @staticmethod
    def of(source: RowSource, lead: Iterable[int]) -> LazyRows:
        """All rows of `source`, shaped (*lead, features)."""
        lead = tuple(lead)
        ids = torch.arange(prod(lead), device=source.device).view(lead)
        return LazyRows._make(source, ids, source.dtype, everything=True, rising=True)

    @staticmethod
    def _make(source: RowSource, ids: Tensor, dtype: torch.dtype, *, everything: bool, rising: bool) -> LazyRows:
        lazy: LazyRows = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            LazyRows,
            (*ids.shape, source.features),
            dtype=dtype,
            device=source.device,
            requires_grad=torch.is_grad_enabled(),
        )
        lazy.source, lazy.ids, lazy.everything, lazy.rising = source, ids, everything, rising
        lazy.value, lazy.viewed = None, None
        with torch._C.DisableTorchFunctionSubclass():
            if lazy.requires_grad:
                lazy.register_hook(_PassOn(lazy))
        return lazy

    def with_source(self, source: RowSource) -> LazyRows:
        """The same rows of a source that is computed from this one's."""
        return LazyRows._make(source, self.ids, source.dtype, everything=self.everything, rising=self.rising)

    def with_ids(self, ids: Tensor, *, in_order: bool) -> LazyRows:
        """Other rows of the same source; in_order: ids drops or regroups some of these, without repeating or moving."""
        everything = self.everything and in_order and ids.numel() == self.ids.numel()
        rising = self.rising and in_order
        lazy = LazyRows._make(self.source, ids, self.dtype, everything=everything, rising=rising)
        lazy.viewed = self
        return lazy

    def materialize(self) -> Tensor:
        """The values as an ordinary tensor in the autograd graph; computed once, whoever asks first."""
        if self.value is None:
            with torch.enable_grad():
                root = self.root()
                if self.everything and root is not self:
                    self.value = root.materialize().view(self.shape)
                elif root.everything and root.value is not None:
                    rows = root.value.view(-1, root.shape[-1])
                    self.value = rows.index_select(0, self.ids.reshape(-1)).view(self.shape)
                else:
                    rows = self.pick(self.ids.reshape(-1))
                    self.value = rows.view(self.shape).to(self.dtype)
        return self.value

    def pick(self, ids: Tensor | None) -> Tensor:
        """The source's rows at some of this tensor's ids (R,), in the order that they have here; None: all of them."""
        ids = (self.ids if ids is None else ids).reshape(-1).contiguous()
        if self.everything and ids.numel() == self.ids.numel():
            return self.source.rows(None)
        if not self.source.select:
            return self.source.rows(None).index_select(0, ids)
        return self.source.rows(ids) if self.rising else pick_rows(self.source, ids)

    def root(self) -> LazyRows:
        """The tensor that stock would have made this one a view of, after any number of steps; else itself."""
        lazy = self
        while lazy.viewed is not None:
            lazy = lazy.viewed
        return lazy

    def computed(self) -> bool:
        """Whether values exist, here or in the root. They may have been written to, so from then on they count."""
        return self.value is not None or self.root().value is not None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = cls.handlers.get(func)
        first = args[0] if args else None
        if handler is not None and isinstance(first, LazyRows) and not first.computed():
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if isinstance(first, LazyRows) and first.viewed is not None and not first.everything and _writes(func):
            raise RuntimeError(
                "fasttune: a slice of tensors that are computed on demand (logits in training) was written to. Clone it"
                " first, or patch with fasttune.patch(model, loss=False, trim=False)."
            )
        return func(*materialized(args), **materialized(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Reached only from below Python (a C++ extension, a backward hook on a module's input): no gradient could flow.
        raise RuntimeError(
            f"fasttune: a tensor that is computed on demand reached {func} without its values;"
            " fasttune.patch(model, loss=False, trim=False) has such tensors computed always."
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.materialize())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.materialize().detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().detach().__reduce_ex__(protocol)

    handlers: ClassVar[dict[Callable[..., Any], Callable[..., Any]]] = {}


class _PassOn:
    """A gradient that reached a LazyRows itself goes on into the graph of its values: a torch.autograd.Function takes
    its arguments without asking __torch_function__, and so gets a leaf where stock's logits have a graph."""

    def __init__(self, lazy: LazyRows) -> None:
        self._lazy = weakref.ref(lazy)

    def __call__(self, grad: Tensor | None) -> None:
        if grad is None:  # from a function that several tensors went through (DDP's), but not this one to the loss
            return
        lazy = self._lazy()
        assert lazy is not None  # the graph that the gradient came through holds it
        keep_graph = torch._C._autograd._get_current_graph_task_keep_graph()
        torch.autograd.backward(lazy.materialize(), grad, retain_graph=keep_graph)


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def take_rows(x: Tensor, ids: Tensor) -> Tensor:
    """x[ids] for ids as pick_rows asks for them: where they are distinct, backward copies."""
    return x.index_select(0, ids) if reading_waits(x.device) else gather_rows(x, ids)


def pick_rows(source: RowSource, ids: Tensor) -> Tensor:
    """source's rows at ids (R,), which may repeat and be in any order.

    The source is asked for each of them once, or on a GPU, whose host would have to wait to learn how many there are,
    for each as often as it stands in ids.
    """
    if reading_waits(source.device):
        rising, order = ids.sort(stable=True)
        return source.rows(rising).index_select(0, order.argsort())
    distinct, places = ids.unique(return_inverse=True)
    rows = source.rows(distinct)
    in_order = distinct.numel() == ids.numel() and torch.equal(distinct, ids)  # the usual case
    return rows if in_order else rows.index_select(0, places)


def materialized(value: Any) -> Any:
    """Ordinary tensors for every LazyRows in a value, lists, tuples and dicts included."""
    if isinstance(value, LazyRows):
        return value.materialize()
    if isinstance(value, dict):
        return {key: materialized(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(materialized(item) for item in value)
    return value


_METADATA: set[Callable[..., Any]] = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "requires_grad", "layout", "ndim", "is_leaf", "is_cuda", "is_cpu")
} | {
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.get_device),
}


def _getitem(lazy: LazyRows, index: Any) -> Any:
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(item is Ellipsis or type(item) in (int, slice) or isinstance(item, Tensor) for item in items):
        return NotImplemented
    if any(isinstance(item, LazyRows) for item in items):
        return NotImplemented
    is_mask = [isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) for item in items]
    consumed = sum(item.dim() if mask else item is not Ellipsis for item, mask in zip(items, is_mask, strict=True))
    after_ellipsis = any(item is Ellipsis for item in items[:-1])
    if after_ellipsis or consumed == lazy.dim():  # the last item speaks of the features
        if not (isinstance(items[-1], slice) and items.pop() == slice(None)):
            return NotImplemented
    elif consumed > lazy.dim() - 1:
        return NotImplemented
    plain = all(item is Ellipsis or type(item) is int or isinstance(item, slice) for item in items)
    in_order = all((item.step or 1) > 0 for item in items if isinstance(item, slice)) and (
        plain or (len(items) == 1 and is_mask[0])
    )
    return lazy.with_ids(lazy.ids[tuple(items)], in_order=in_order)


def _view(lazy: LazyRows, *shape: Any) -> Any:
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if not sizes or not all(type(size) is int for size in sizes) or lazy.source.features == 0:
        return NotImplemented  # a view as another dtype, or symbolic sizes
    keeps_features = sizes[-1] == lazy.source.features or (
        sizes[-1] == -1 and prod(sizes[:-1]) == lazy.ids.numel() and lazy.ids.numel() > 0
    )
    return lazy.with_ids(lazy.ids.reshape(sizes[:-1]), in_order=True) if keeps_features else NotImplemented


def _clone(lazy: LazyRows, **_: Any) -> LazyRows:
    return LazyRows._make(lazy.source, lazy.ids, lazy.dtype, everything=lazy.everything, rising=lazy.rising)


def _cast(lazy: LazyRows, dtype: torch.dtype) -> LazyRows:
    if dtype == lazy.dtype:
        return lazy
    return LazyRows._make(lazy.source, lazy.ids, dtype, everything=lazy.everything, rising=lazy.rising)


def _to(lazy: LazyRows, *args: Any, **kwargs: Any) -> Any:
    dtype = lazy.dtype
    for target in (*args, *(kwargs[key] for key in ("dtype", "device") if key in kwargs)):
        if isinstance(target, torch.dtype) and target.is_floating_point:
            dtype = target
        elif isinstance(target, (str, torch.device)):
            device = torch.device(target)
            if device.type != lazy.device.type or device.index not in (None, lazy.device.index):
                return NotImplemented
        elif not isinstance(target, bool):
            return NotImplemented
    return _cast(lazy, dtype)


def _cross_entropy(
    input: LazyRows,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    logits = input.source
    if not isinstance(logits, LinearRows) or size_average is not None or reduce is not None:
        return NotImplemented
    if target.is_floating_point() or target.shape != input.ids.shape or input.dim() != 2:
        return NotImplemented
    logits.check_unchanged()
    with logits.same_autocast():
        hidden_rows = input.with_source(logits.source)
        count = None
        # Rows that were picked one by one are few (a classifier's); a GPU need not tell how many of them have a label.
        picked = not input.rising and reading_waits(target.device)
        if (isinstance(logits.source, TensorRows) and input.everything) or not logits.select or picked:
            hidden, labels, labelled = hidden_rows.pick(None), target, None
        else:  # compute the rows that carry a label, and no others
            count = _labels_foreseen(input, target, ignore_index)
            labelled = places(target != ignore_index, count)
            hidden, labels = hidden_rows.pick(input.ids[labelled]), target[labelled]
    with _loss_precision(logits, input.dtype, hidden.dtype):
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
    if labelled is None:
        return loss
    if reduction == "none":
        loss = loss.new_zeros(target.shape).index_copy(0, labelled, loss)
    if count is not None:  # whatever a hook did to the labels since then, never a wrong number silently
        loss = torch.where((target != ignore_index).sum() == count, loss, torch.nan)
    return loss


def _labels_foreseen(input: LazyRows, target: Tensor, ignore_index: int) -> int | None:
    """How many labels the model's own loss will find, if that was read when the model was entered: to read it here, the
    host would wait for a GPU."""
    if not reading_waits(target.device) or not input.everything or ignore_index != IGNORED:
        return None
    return labelled_rows(target.numel())


def _loss_precision(logits: LinearRows, dtype: torch.dtype, hidden_dtype: torch.dtype) -> AbstractContextManager[Any]:
    """16-bit logits that were cast to float32 before the loss have a float32 loss; the operation returns that under
    autocast, which changes nothing else about inputs that are 16-bit already."""
    if dtype == torch.float32 and hidden_dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(logits.device.type, dtype=hidden_dtype)
    return logits.same_autocast()


LazyRows.handlers = {
    Tensor.__getitem__: _getitem,
    Tensor.view: _view,
    Tensor.reshape: _view,
    torch.reshape: _view,
    Tensor.contiguous: lambda lazy, **_: lazy,
    Tensor.clone: _clone,
    torch.clone: _clone,
    Tensor.to: _to,
    Tensor.float: lambda lazy, **_: _cast(lazy, torch.float32),
    Tensor.half: lambda lazy, **_: _cast(lazy, torch.float16),
    Tensor.bfloat16: lambda lazy, **_: _cast(lazy, torch.bfloat16),
    F.cross_entropy: _cross_entropy,
    # There is none before the values are. DDP asks, to tell which outputs its own node has to follow.
    Tensor.grad_fn.__get__: lambda lazy: None,  # type: ignore[union-attr]
}
