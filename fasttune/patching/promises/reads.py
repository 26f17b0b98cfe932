"""Which reads of a promised tensor are understood: what they cost is the rows that they need.

Rows that are chosen (slices, indices, gather, masks), rows that nobody will see (a product with a mask of zeros,
masked_fill, where, pack_padded_sequence), and functions of each row alone (linear layers, LayerNorms, dropout,
activations, casts), which become promises themselves. A handler returns NotImplemented for arguments it does not know:
then all rows are computed.

One thing is taken for granted: rows that a mask multiplies by zero are finite, as the rows of a LayerNorm are.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttune import ops
from fasttune.ops._random import draw_seed, repeating
from fasttune.patching.promises.origins import TOO_LATE, Hook, spread
from fasttune.patching.promises.source import on
from fasttune.patching.promises.tensor import PromisedRows, materialized

Handler = Callable[..., Any]


def _fresh(value: Any) -> bool:
    """Whether value is a promised tensor of which nothing is computed yet."""
    return isinstance(value, PromisedRows) and value.untouched()


def _of_rows(value: Any) -> bool:
    """Whether a function of each row may be promised too: of many rows. A few chosen ones are computed."""
    if not _fresh(value) or torch.compiler.is_compiling():
        return False
    state = value.state
    if not torch.is_grad_enabled() and not state.source.padded:
        return False  # in evaluation nothing is gained by waiting
    return state.everything or (state.rising and state.ids.dim() >= 2)


def before(first: Handler, then: Handler | None) -> Handler:
    """first, and where it does not know, then."""

    def handler(*args: Any, **kwargs: Any) -> Any:
        found = first(*args, **kwargs)
        return found if found is not NotImplemented or then is None else then(*args, **kwargs)

    return handler


# Rows that are chosen


def _getitem(promised: PromisedRows, index: Any) -> Any:
    if not _fresh(promised):
        return NotImplemented
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, PromisedRows) for item in items):
        return NotImplemented
    if not getattr(promised.state.source, "select", True) and any(isinstance(item, Tensor) for item in items):
        return NotImplemented  # with trim=False no rows are looked for: on a GPU the host would wait for the index
    items = [torch.tensor(item) if isinstance(item, list) else item for item in items]
    known = (int, slice)
    if not all(item is Ellipsis or item is None or type(item) in known or isinstance(item, Tensor) for item in items):
        return NotImplemented
    is_mask = [isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) for item in items]
    consumed = sum(
        item.dim() if mask else item is not Ellipsis and item is not None
        for item, mask in zip(items, is_mask, strict=True)
    )
    after_ellipsis = any(item is Ellipsis for item in items[:-1])
    if after_ellipsis or consumed == promised.dim():  # the last item speaks of the features
        if not (isinstance(items[-1], slice) and items.pop() == slice(None)):
            return NotImplemented
    elif consumed > promised.dim() - 1:
        return NotImplemented
    plain = all(item is Ellipsis or item is None or type(item) is int or isinstance(item, slice) for item in items)
    in_order = all((item.step or 1) > 0 for item in items if isinstance(item, slice)) and (
        plain or (len(items) == 1 and is_mask[0])
    )
    items = [item.cpu() if isinstance(item, Tensor) else item for item in items]
    chosen = promised.with_ids(promised.state.ids[tuple(items)], in_order=in_order)
    if not torch.is_grad_enabled() and chosen.dim() < 3:  # in evaluation a few rows are an ordinary tensor
        return chosen.materialize()
    return chosen


def _lead_dim(promised: PromisedRows, dim: Any) -> int | None:
    """A dimension counted from the front, None if it is the features'."""
    if type(dim) is not int or not -promised.dim() <= dim < promised.dim():
        return None
    dim %= promised.dim()
    return dim if dim < promised.dim() - 1 else None


def _index_select(promised: PromisedRows, dim: int, index: Tensor) -> Any:
    if not _fresh(promised) or (lead := _lead_dim(promised, dim)) is None or isinstance(index, PromisedRows):
        return NotImplemented
    return promised.with_ids(promised.state.ids.index_select(lead, index.cpu()), in_order=False)


def _select(promised: PromisedRows, dim: int, index: int) -> Any:
    if not _fresh(promised) or (lead := _lead_dim(promised, dim)) is None or type(index) is not int:
        return NotImplemented
    return promised.with_ids(promised.state.ids.select(lead, index), in_order=True)


def _narrow(promised: PromisedRows, dim: int, start: Any, length: Any) -> Any:
    if not _fresh(promised) or (lead := _lead_dim(promised, dim)) is None or type(start) is not int:
        return NotImplemented
    return promised.with_ids(promised.state.ids.narrow(lead, start, length), in_order=True)


def _gather(promised: PromisedRows, dim: int, index: Tensor, **_: Any) -> Any:
    """Whole rows: an index that is the same for all features."""
    if not _fresh(promised) or (lead := _lead_dim(promised, dim)) is None or isinstance(index, PromisedRows):
        return NotImplemented
    if index.dim() != promised.dim() or index.shape[-1] != promised.shape[-1] or promised.shape[-1] == 0:
        return NotImplemented
    first = index[..., :1]
    if index.stride(-1) != 0 and not bool((index == first).all()):
        return NotImplemented
    return promised.with_ids(promised.state.ids.gather(lead, first[..., 0].cpu()), in_order=False)


def _take_along_dim(promised: PromisedRows, indices: Tensor, dim: int | None = None) -> Any:
    if dim is None or not _fresh(promised) or not isinstance(indices, Tensor) or indices.dim() != promised.dim():
        return NotImplemented
    shape = list(promised.shape)
    shape[dim] = indices.shape[dim]
    return (
        _gather(promised, dim, indices.expand(shape)) if dim % promised.dim() < promised.dim() - 1 else NotImplemented
    )


def _masked_select(promised: PromisedRows, mask: Tensor) -> Any:
    if not _fresh(promised) or isinstance(mask, PromisedRows) or mask.dim() != promised.dim():
        return NotImplemented
    first = mask[..., :1]
    if not bool((mask == first).all()):
        return NotImplemented
    rows = first[..., 0].expand(promised.shape[:-1])
    return promised.with_ids(promised.state.ids[rows.cpu()], in_order=True).materialize().reshape(-1)


def _view(promised: PromisedRows, *shape: Any, **kwargs: Any) -> Any:
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    features = promised.state.source.features if isinstance(promised, PromisedRows) else 0
    if kwargs or not _fresh(promised) or not sizes or not all(type(size) is int for size in sizes) or features == 0:
        return NotImplemented  # a view as another dtype, or symbolic sizes
    ids = promised.state.ids
    keeps_features = sizes[-1] == features or (sizes[-1] == -1 and prod(sizes[:-1]) == ids.numel() > 0)
    return promised.with_ids(ids.reshape(sizes[:-1]), in_order=True) if keeps_features else NotImplemented


def _flatten(promised: PromisedRows, start_dim: int = 0, end_dim: int = -1) -> Any:
    if not _fresh(promised) or (end := _lead_dim(promised, end_dim)) is None:
        return NotImplemented
    return promised.with_ids(promised.state.ids.flatten(start_dim % promised.dim(), end), in_order=True)


def _unsqueeze(promised: PromisedRows, dim: int) -> Any:
    if not _fresh(promised) or not -promised.dim() <= dim < promised.dim():
        return NotImplemented
    dim = dim if dim >= 0 else dim + promised.dim() + 1
    return (
        promised.with_ids(promised.state.ids.unsqueeze(dim), in_order=True) if dim < promised.dim() else NotImplemented
    )


def _pack_padded_sequence(promised: PromisedRows, lengths: Tensor, batch_first: bool) -> Any:
    """What torch.nn.utils.rnn.pack_padded_sequence asks for: time step by time step, the sequences not ended yet."""
    if not _fresh(promised) or promised.dim() != 3 or lengths.numel() == 0 or int(lengths.min()) <= 0:
        return NotImplemented
    ids = promised.state.ids if not batch_first else promised.state.ids.T
    if lengths.numel() != ids.shape[1] or int(lengths.max()) > ids.shape[0] or bool((lengths.diff() > 0).any()):
        return NotImplemented
    running = torch.arange(int(lengths.max()))[:, None] < lengths.cpu()
    chosen = promised.with_ids(ids[: running.shape[0]][running], in_order=False)
    return chosen.materialize(), running.sum(1)


# Rows that nobody will see


def _spread(rows: Tensor, ids: Tensor, shape: torch.Size, fill: float = 0.0) -> Tensor:
    """(R, E) to (*lead, E), `fill` where there are no rows."""
    whole = torch.full((prod(shape[:-1]), shape[-1]), fill, dtype=rows.dtype, device=rows.device)
    return whole.index_copy(0, on(ids, rows.device), rows).view(shape)


def _rows_where(promised: PromisedRows, seen: Tensor) -> tuple[Tensor, Tensor] | None:
    """(places in the flattened lead, rows there) where `seen`, broadcast to the tensor's shape, is not False in all
    features; None if that is everywhere."""
    if seen.dim() > promised.dim() or torch.broadcast_shapes(seen.shape, promised.shape) != promised.shape:
        return None
    seen = seen.any(-1) if seen.dim() else seen
    places = seen.expand(promised.shape[:-1]).flatten().nonzero().squeeze(1).cpu()
    if places.numel() == promised.state.ids.numel():
        return None
    chosen = promised.with_ids(promised.state.ids.reshape(-1)[places], in_order=True)
    return places, chosen.materialize()


def _masked(other: Any) -> bool:
    plain = isinstance(other, Tensor) and not isinstance(other, PromisedRows)
    return plain and other.dim() > 0 and not other.requires_grad


def _mul(a: Any, b: Any, **kwargs: Any) -> Any:
    promised, other = (a, b) if isinstance(a, PromisedRows) else (b, a)
    if kwargs or not _fresh(promised):
        return NotImplemented
    if isinstance(other, (int, float)) and _of_rows(promised):
        return promised.mapped(lambda rows, ids: rows * other)
    if not _masked(other):
        return NotImplemented
    found = _rows_where(promised, other != 0)
    if found is None:
        return NotImplemented
    places, rows = found
    features = (
        other.expand(promised.shape).reshape(-1, promised.shape[-1])
        if other.dim() > 1 and other.shape[-1] > 1
        else None
    )
    if features is None:
        factor = other.expand(*promised.shape[:-1], other.shape[-1]).reshape(-1, other.shape[-1])
    else:
        factor = features
    product = rows * factor.index_select(0, on(places, factor.device))
    return _spread(product, places, promised.shape)


def _masked_fill(promised: PromisedRows, mask: Tensor, value: Any) -> Any:
    if not _fresh(promised) or not _masked(mask) or not isinstance(value, (int, float)):
        return NotImplemented
    found = _rows_where(promised, ~mask)
    if found is None:
        return NotImplemented
    return _spread(found[1], found[0], promised.shape).masked_fill(mask, value)


def _masked_fill_(promised: PromisedRows, mask: Tensor, value: Any) -> Any:
    """In place: from now on these are its values."""
    if not _fresh(promised) or promised.state.viewed is not None:
        return NotImplemented
    filled = _masked_fill(promised, mask, value)
    if filled is NotImplemented:
        return NotImplemented
    promised.state.value, promised.state.used = filled, True
    return promised


def _where(condition: Any, a: Any = None, b: Any = None) -> Any:
    if not _masked(condition) or (isinstance(a, PromisedRows) and isinstance(b, PromisedRows)):
        return NotImplemented
    promised, needed = (a, condition) if isinstance(a, PromisedRows) else (b, ~condition)
    if not _fresh(promised) or condition.dim() < 1:
        return NotImplemented
    found = _rows_where(promised, needed)
    if found is None:
        return NotImplemented
    whole = _spread(found[1], found[0], promised.shape)
    return torch.where(condition, whole, b) if promised is a else torch.where(condition, a, whole)


def _bmm(weights: Any, promised: Any) -> Any:
    """(B, Q, S) @ (B, S, E): tokens whose weight is zero for every query are not needed."""
    if not _fresh(promised) or not _masked(weights) or weights.dim() != 3 or promised.dim() != 3:
        return NotImplemented
    found = _rows_where(promised, (weights != 0).any(1)[..., None])
    if found is None:
        return NotImplemented
    return torch.bmm(weights, _spread(found[1], found[0], promised.shape).to(promised.dtype))


# Shape, dtype and device alone


def _expand_as(x: Any, other: Any) -> Any:
    return NotImplemented if isinstance(x, PromisedRows) else x.expand(other.shape)


def _type_as(x: Any, other: Any) -> Any:
    return NotImplemented if isinstance(x, PromisedRows) else x.to(device=other.device, dtype=other.dtype)


def _like(function: Callable[..., Tensor], **more: Any) -> Handler:
    """For zeros_like, new_zeros and their relatives: of a tensor with the promised one's properties and no memory."""

    def handler(promised: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(promised, PromisedRows):
            return NotImplemented
        stand_in = torch.empty((), dtype=promised.dtype, device=promised.device).expand(promised.shape)
        return function(stand_in, *args, **(more | kwargs))

    return handler


# Functions of each row


def _linear(promised: Any, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not _of_rows(promised) or isinstance(weight, PromisedRows) or isinstance(bias, PromisedRows):
        return NotImplemented
    function = lambda rows, ids: F.linear(rows, weight, bias)  # noqa: E731
    return promised.mapped(function, (weight, bias), weight.shape[0])


def _layer_norm(promised: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    if not _of_rows(promised) or tuple(normalized_shape) != promised.shape[-1:]:
        return NotImplemented
    function = lambda rows, ids: F.layer_norm(rows, normalized_shape, weight, bias, eps)  # noqa: E731
    return promised.mapped(function, (weight, bias))


def _dropout(promised: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """By fasttune's generator, which goes by the numbers of the rows: whatever rows are read later drop the same."""
    if inplace or not _fresh(promised) or not 0.0 <= p <= 1.0:
        return NotImplemented
    if not training or p == 0.0:
        return promised
    return dropped(promised, p, None) if promised.state.everything else NotImplemented


def dropped(promised: PromisedRows, p: float, backend: str | None) -> PromisedRows:
    """dropout(rows, p) of promised rows, the seed drawn now."""
    seeds = [draw_seed(promised.device)]

    def function(rows: Tensor, ids: Tensor | None) -> Tensor:
        with repeating(seeds):
            return ops.dropout(
                rows, dropout_p=p, row_ids=None if ids is None else on(ids, rows.device), backend=backend
            )

    return promised.mapped(function)


def _normalize(promised: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Any:
    if out is not None or not _of_rows(promised) or dim % promised.dim() != promised.dim() - 1:
        return NotImplemented
    return promised.mapped(lambda rows, ids: F.normalize(rows, p, -1, eps))


def _rowwise(function: Callable[..., Tensor]) -> Handler:
    """For functions of each element, called with the tensor and numbers or strings."""

    def handler(promised: Any, *args: Any, **kwargs: Any) -> Any:
        plain = all(isinstance(x, (int, float, str, bool, type(None))) for x in (*args, *kwargs.values()))
        if kwargs.get("inplace") or not plain or not _of_rows(promised):
            return NotImplemented
        return promised.mapped(lambda rows, ids: function(rows, *args, **kwargs))

    return handler


# Casts and copies


def _clone(promised: PromisedRows, **_: Any) -> Any:
    if not _fresh(promised):
        return NotImplemented
    return promised.cast(promised.dtype)


def _cast(promised: Any, dtype: torch.dtype) -> Any:
    if not _fresh(promised):
        return NotImplemented
    return promised if dtype == promised.dtype else promised.cast(dtype)


def _to(promised: Any, *args: Any, **kwargs: Any) -> Any:
    if not _fresh(promised):
        return NotImplemented
    dtype = promised.dtype
    for target in (*args, *(kwargs[key] for key in ("dtype", "device") if key in kwargs)):
        if isinstance(target, torch.dtype) and target.is_floating_point:
            dtype = target
        elif isinstance(target, (str, torch.device)):
            device = torch.device(target)
            if device.type != promised.device.type or device.index not in (None, promised.device.index):
                return NotImplemented
        elif not isinstance(target, bool):
            return NotImplemented
    return _cast(promised, dtype)


# Gradients of the tensor itself


def _watch(name: str) -> Handler:
    """register_hook and retain_grad: on the tensor's own node, and from now on its values go through that."""

    def handler(promised: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(promised, PromisedRows):
            return NotImplemented
        state = promised.state
        if state.too_late():
            raise RuntimeError(TOO_LATE)
        origins, hook = state.origins(), None
        if origins is not None and name == "retain_grad":
            origins.ask(state.shelf)
        elif origins is not None and state.read_apart():
            hook = Hook(*args, **kwargs)
            origins.hook(hook, state.shape, state.dtype)
            args, kwargs = (hook,), {}
        elif state.value is not None and state.value.requires_grad:
            getattr(state.value, name)(*args, **kwargs)
        state.watched = True
        with torch._C.DisableTorchFunctionSubclass():
            own = getattr(Tensor, name)(promised, *args, **kwargs)
        if hook is not None:
            hook.handle = own
        return own

    return handler


def _grad_of(promised: Any) -> Any:
    """From then on all of it lies at the tensor itself, for whoever writes to it."""
    state, grads = promised.state, []
    origins, value = state.origins(), state.value
    if origins is not None:
        grads = [_whole(state, grad, ids) for ids, grad in origins.take_grads()]
    elif value is not None and (value.is_leaf or value.retains_grad):
        grads, value.grad = [value.grad], None
    with torch._C.DisableTorchFunctionSubclass():
        if any(grad is not None for grad in grads):
            promised.grad = _sum([promised.grad, *grads])
        return promised.grad


def _set_grad(promised: Any, grad: Tensor | None) -> None:
    _grad_of(promised)
    with torch._C.DisableTorchFunctionSubclass():
        promised.grad = grad


def _whole(state: Any, grad: Tensor | None, ids: Tensor | None) -> Tensor | None:
    """The gradient of some rows of a promised tensor's source as one of the tensor."""
    if grad is None:
        return None
    shape = torch.Size((state.source.count, state.source.features))
    matrix = spread(grad, ids, shape)
    if not state.everything:
        matrix = matrix.index_select(0, on(state.ids.reshape(-1), matrix.device))
    return matrix.view(state.shape).to(state.dtype)


def _sum(grads: list[Tensor | None]) -> Tensor | None:
    found = [grad for grad in grads if grad is not None]
    return sum(found[1:], found[0]) if found else None


def _autograd_grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """torch.autograd.grad with promised tensors among the inputs: what reaches their own nodes, and their values."""
    wanted = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    asked: list[Tensor] = []
    # Where each wanted tensor's gradients are among those, and of which rows.
    places: list[list[tuple[int, Any]]] = []
    for tensor in wanted:
        nodes: list[tuple[Tensor, Any]] = [(tensor, None)]
        if isinstance(tensor, PromisedRows):
            state = tensor.state
            if state.too_late():
                raise RuntimeError(TOO_LATE)
            state.watched = True
            origins = state.origins()
            if origins is not None:
                nodes += [(rows, (state, ids)) for ids, rows in origins.alive()]
            elif state.value is not None and state.value.requires_grad:
                nodes.append((state.value, None))
        places.append([(place, how) for place, (_, how) in enumerate(nodes, len(asked))])
        asked += [node for node, _ in nodes]
    allow_unused = kwargs.pop("allow_unused", None)
    with torch._C.DisableTorchFunctionSubclass():
        found: Any = torch.autograd.grad(materialized(outputs), asked, *args, allow_unused=True, **kwargs)  # type: ignore[call-overload]
    result = []
    for at in places:
        grad = _sum([found[place] if how is None else _whole(how[0], found[place], how[1]) for place, how in at])
        if grad is None and not allow_unused and not kwargs.get("materialize_grads"):
            raise RuntimeError("One of the differentiated tensors was not used in the graph; set allow_unused=True.")
        result.append(grad)
    return tuple(result)


_ELEMENTWISE = (
    *(F.gelu, F.relu, F.silu, F.elu, F.leaky_relu, F.softplus, F.mish, F.hardtanh, torch.tanh, torch.sigmoid),
    *(torch.relu, torch.exp, torch.neg, torch.abs, Tensor.tanh, Tensor.sigmoid, Tensor.relu, Tensor.exp, Tensor.neg),
    *(Tensor.abs, Tensor.div, Tensor.__truediv__, torch.div, Tensor.__neg__),
)

_LIKE = (torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like)

PromisedRows.handlers |= {
    Tensor.__getitem__: _getitem,
    **dict.fromkeys((Tensor.index_select, torch.index_select), _index_select),
    **dict.fromkeys((Tensor.select, torch.select), _select),
    **dict.fromkeys((Tensor.narrow, torch.narrow), _narrow),
    **dict.fromkeys((Tensor.gather, torch.gather), _gather),
    **dict.fromkeys((Tensor.take_along_dim, torch.take_along_dim), _take_along_dim),
    **dict.fromkeys((Tensor.masked_select, torch.masked_select), _masked_select),
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _view),
    **dict.fromkeys((Tensor.flatten, torch.flatten), _flatten),
    **dict.fromkeys((Tensor.unsqueeze, torch.unsqueeze), _unsqueeze),
    torch._VF._pack_padded_sequence: _pack_padded_sequence,  # type: ignore[attr-defined]
    **dict.fromkeys((Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply), _mul),
    **dict.fromkeys((Tensor.masked_fill, torch.masked_fill), _masked_fill),
    Tensor.masked_fill_: _masked_fill_,
    torch.where: _where,
    Tensor.where: lambda a, condition, b: _where(condition, a, b),
    **dict.fromkeys((torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__), _bmm),
    Tensor.expand_as: _expand_as,
    Tensor.type_as: _type_as,
    **{function: _like(function, memory_format=torch.contiguous_format) for function in _LIKE},
    **{
        function: _like(function) for function in (Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty)
    },
    F.linear: _linear,
    F.layer_norm: _layer_norm,
    F.dropout: _dropout,
    F.normalize: _normalize,
    **{function: _rowwise(function) for function in _ELEMENTWISE},
    Tensor.contiguous: lambda promised, **_: promised if _fresh(promised) else NotImplemented,
    **dict.fromkeys((Tensor.clone, torch.clone), _clone),
    Tensor.to: _to,
    Tensor.float: lambda promised, **_: _cast(promised, torch.float32),
    Tensor.double: lambda promised, **_: _cast(promised, torch.float64),
    Tensor.half: lambda promised, **_: _cast(promised, torch.float16),
    Tensor.bfloat16: lambda promised, **_: _cast(promised, torch.bfloat16),
    Tensor.register_hook: _watch("register_hook"),
    Tensor.retain_grad: _watch("retain_grad"),
    Tensor.grad.__get__: _grad_of,  # type: ignore[union-attr]
    Tensor.grad.__set__: _set_grad,  # type: ignore[union-attr]
    torch.autograd.grad: _autograd_grad,
}
