"""PromisedRows: a tensor (*lead, features) whose rows are computed when somebody reads them.

It has the shape, dtype and device of what stock would have returned, and a `RowSource` that can compute any of its
rows. Reads that are understood (promises/reads.py) move row numbers around or compute the rows that they need; anything
else gets all values, as an ordinary tensor in the autograd graph, computed once.

Whoever takes the tensor without asking `__torch_function__` (a torch.autograd.Function, a C++ extension, a compiled
region) gets the values too, and gradients that reach the tensor itself go on: it has a node of its own in the graph,
with edges to everything that its rows depend on.

Shape legend: ids (*lead) int64 on the CPU holds the source's row number of each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from fasttune.patching.promises.on_demand import OnDemand
from fasttune.patching.promises.origins import Origins
from fasttune.patching.promises.source import MappedRows, RowSource, Shelf, on

WRITTEN = (
    "fasttune: a slice of a tensor that is computed on demand (logits or hidden states in training) was written to."
    " Clone it first, or patch with fasttune.patch(model, loss=False, trim=False, packing=False)."
)

OTHER = "other code"  # reads a promised tensor without saying what it does with it

_PROPERTIES = (
    *("shape", "dtype", "device", "requires_grad", "layout", "ndim", "is_leaf", "is_cuda", "is_cpu", "is_meta"),
    *("grad_fn", "retains_grad", "output_nr", "is_sparse", "is_nested"),
)


@dataclass(eq=False)
class State:
    """What a promised tensor is, apart from the tensor: shared with its node in the graph.

    everything: ids are 0, 1, 2, ...: all rows in order. rising: ids rise: rows were left out, none repeated or moved.
    viewed: the state of the tensor whose view stock would have returned; made_of: of the one it is a copy of.
    watched: somebody asked for its gradient. used: its values, or rows of its source, lie in a graph of somebody's.
    lent: something was made of its source's rows, whose gradient does not come through it.
    picked: some of its rows were read, as rows of the source.
    itself: it was lent, used or picked from, not only what was taken from it. derived: how many views and casts it has.
    version: of value, as it was computed.
    """

    source: RowSource
    ids: Tensor
    dtype: torch.dtype
    everything: bool
    rising: bool
    viewed: State | None = None
    made_of: State | None = None
    value: Tensor | None = None
    watched: bool = False
    used: bool = False
    lent: bool = False
    picked: bool = False
    itself: bool = False
    derived: int = 0
    version: int = -1
    shelf: Shelf = field(default_factory=Shelf)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.ids.shape, self.source.features))

    def root(self) -> State:
        state = self
        while state.viewed is not None:
            state = state.viewed
        return state

    def computed(self) -> bool:
        """Whether values exist, here or in the root. They may have been written to, so from then on they count."""
        return self.value is not None or self.root().value is not None

    def materialize(self, reader: str = OTHER) -> Tensor:
        """The values as an ordinary tensor in the autograd graph; computed once, whoever asks first. reader: who asks,
        for the report."""
        if self.value is None:
            root = self.root()
            if root is not self and (self.everything or root.value is not None):
                with self.source.moment.again():
                    whole = root.materialize(reader)
                    if self.everything:
                        self.value = whole.view(self.shape)
                    else:
                        rows = whole.reshape(-1, whole.shape[-1])
                        self.value = rows.index_select(0, on(self.ids.reshape(-1), rows.device)).view(self.shape)
            else:
                if self.everything:
                    self.source.told(reader)
                for link in self.chain():
                    link.picked = link.picked or link is not self
                self.itself = True
                rows = self._rows(None)
                with self.source.moment.again():
                    value = rows.view(self.shape).to(self.dtype)
                    # Whoever has the values may write to them: the source computes its own again, or keeps its few.
                    self.value = value if self.everything else value.clone()
                if self.everything:
                    self.source.forget(rows)
            self.version = _version(self.value)
        return self.value

    def anew(self) -> Tensor:
        """The values in a graph of their own, for whoever goes through it apart from others."""
        root = self.root()
        if not (self.used or root.used or self.source.origins.wanted):
            return self.materialize()
        return State(self.source.anew(), self.ids, self.dtype, self.everything, self.rising).materialize()

    def too_late(self) -> bool:
        """Whether to ask for the gradient now would miss what was made before, and is to be refused."""
        if not self.source.late and self.value is None and (self.lent or self.used):
            return True
        return self.origins() is None and (self.lent or self.picked)

    def origins(self) -> Origins | None:
        """Where the gradient of what was made before can be had; None: in `value`, if anything was made."""
        written = self.value is not None and _version(self.value) != self.version
        if written or not self.rising or self.dtype != self.source.dtype or self.source.holds_itself:
            return None
        before = list(self.chain())[1:]
        # What the source's rows got is this tensor's only if nobody read them but through it.
        alone = self.everything and all(not state.itself and state.derived == 1 for state in before)
        return self.source.origins if alone or not before else None

    def read_apart(self) -> bool:
        """Whether rows were read otherwise than as a part of `value`."""
        return self.lent or self.picked or (self.used and self.value is None)

    def note(self, read: str) -> None:
        """It was "lent", "used" or "picked" from, and with it those that it was taken from."""
        self.itself = True
        for state in self.chain():
            setattr(state, read, True)

    def chain(self) -> Iterator[State]:
        """This state and those that it was taken from."""
        state: State | None = self
        while state is not None:
            yield state
            state = state.viewed or state.made_of

    def pick(self, ids: Tensor | None) -> Tensor:
        """The source's rows at some of this tensor's ids (R,), in the order that they have here; None: all of them."""
        self.note("picked")
        return self._rows(ids)

    def _rows(self, ids: Tensor | None) -> Tensor:
        ids = (self.ids if ids is None else ids).reshape(-1)
        if self.everything and ids.numel() == self.ids.numel():
            return self.source.read(None)
        if self.rising:
            return self.source.read(ids)
        distinct, places = ids.unique(return_inverse=True)
        rows = self.source.read(distinct)
        if distinct.numel() == ids.numel() and torch.equal(distinct, ids):  # the usual case
            return rows
        with self.source.moment.again():
            return rows.index_select(0, on(places, rows.device))


class PromisedRows(OnDemand):
    """See the top of this file. Make one with `PromisedRows.of(source, lead)`."""

    state: State
    own_node: Any

    @staticmethod
    def of(source: RowSource, lead: Iterable[int]) -> PromisedRows:
        """All rows of `source`, shaped (*lead, features)."""
        lead = tuple(lead)
        ids = torch.arange(prod(lead)).view(lead)
        state = State(source, ids, source.dtype, everything=True, rising=True)
        state.shelf = source.shelf()
        return _promised(state, source.leaves)

    def with_source(self, source: RowSource) -> PromisedRows:
        """The same rows of a source that is computed from this one's."""
        old = self.state
        old.note("lent")
        state = State(source, old.ids, source.dtype, everything=old.everything, rising=old.rising)
        state.shelf = source.shelf()
        return _promised(state, source.leaves)

    def mapped(
        self,
        function: Callable[[Tensor, Tensor | None], Tensor],
        weights: tuple[Tensor | None, ...] = (),
        features: int | None = None,
    ) -> PromisedRows:
        """function(rows, ids) of these rows, as in MappedRows; the dtype is what function makes of no rows."""
        source, features = self.state.source, self.shape[-1] if features is None else features
        with torch.no_grad():
            empty = torch.empty(0, self.shape[-1], dtype=self.dtype, device=self.device)
            dtype = function(empty, torch.empty(0, dtype=torch.int64)).dtype
        if self.dtype != source.dtype:
            cast, inner = self.dtype, function
            function = lambda rows, ids: inner(rows.to(cast), ids)  # noqa: E731
        return self.with_source(MappedRows(source, function, weights, features, dtype))

    def with_ids(self, ids: Tensor, *, in_order: bool) -> PromisedRows:
        """Other rows of the same source; in_order: ids drops or regroups some of these, without repeating or moving."""
        old = self.state
        old.derived += 1
        everything = old.everything and in_order and ids.numel() == old.ids.numel()
        state = State(old.source, ids, old.dtype, everything, old.rising and in_order, viewed=old, shelf=old.shelf)
        return _promised(state, (self,))

    def cast(self, dtype: torch.dtype) -> PromisedRows:
        old = self.state
        old.derived += 1
        state = State(old.source, old.ids, dtype, old.everything, old.rising, made_of=old, shelf=old.shelf)
        return _promised(state, (self,))

    def untouched(self) -> bool:
        """Whether this is still the tensor that was promised: nobody has computed it, asked for its gradient, or given
        it another place in the graph (a checkpoint that returned it does)."""
        return not self.state.computed() and self.own_node is _node_of(self) and not self.state.watched

    def materialize(self, reader: str = OTHER) -> Tensor:
        """The values as an ordinary tensor in the autograd graph. reader: who asks, for the report."""
        watched = self.own_node is not None and any(state.watched for state in self.state.chain())
        if watched or self.own_node is not _node_of(self):
            values: Tensor = _Through.apply(self)
            return values
        if torch.is_grad_enabled():
            self.state.note("used")
        return self.state.materialize(reader)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in cls.metadata:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = positional(args, kwargs)
        first = args[0] if args else None
        handler = cls.handlers.get(func)
        if handler is not None and kwargs.get("out") is None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if isinstance(first, PromisedRows):
            state = first.state
            if state.viewed is not None and not state.everything and _writes(func):
                raise RuntimeError(WRITTEN)
        reader = getattr(func, "__name__", OTHER)
        return func(*materialized(args, reader), **materialized(kwargs, reader))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Reached from below Python alone, and below autograd: gradients go through the tensor's own node.
        return func(*_values(args), **_values(kwargs or {}))

    handlers: ClassVar[dict[Any, Callable[..., Any]]] = {}
    metadata: ClassVar[set[Any]] = {
        *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
        *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__),
        *(Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.get_device, Tensor.is_inference),
    }


class _Promise(torch.autograd.Function):
    """The node of a promised tensor: gradients that reach the tensor itself go on to what its rows depend on."""

    @staticmethod
    def forward(ctx: Any, state: State, *leaves: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.state = state
        ctx.view = None
        if len(leaves) == 1 and isinstance(leaves[0], PromisedRows):
            ctx.view = leaves[0].state
        return _wrapper(state)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        state: State = ctx.state
        grad = grads[0]
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        if ctx.view is not None:
            return None, _of_parent(state, ctx.view, grad)
        leaves = state.source.leaves
        # A weight that several layers share gets its gradient once, one that was frozen meanwhile none, as in stock.
        wanted = {
            id(leaf): leaf
            for leaf, need in zip(leaves, ctx.needs_input_grad[1:], strict=True)
            if need and leaf.requires_grad
        }
        if not wanted:
            return (None,) * len(ctx.needs_input_grad)
        with torch.enable_grad():
            value = state.anew()
        with _ending_at(list(wanted.values())):
            grads = torch.autograd.grad(value, list(wanted.values()), grad, retain_graph=True, allow_unused=True)
        found = dict(zip(wanted, grads, strict=True))
        return None, *(found.pop(id(leaf), None) for leaf in leaves)


class _Through(torch.autograd.Function):
    """The values of a promised tensor, as a function of the tensor itself: its hooks see their gradient."""

    @staticmethod
    def forward(ctx: Any, promised: PromisedRows) -> Tensor:
        return promised.state.materialize().detach().view_as(promised.state.materialize())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


@contextmanager
def _ending_at(tensors: list[Tensor]) -> Iterator[None]:
    """Within it gradients end at these tensors, whose own place in the graph passes them on later: a weight that is
    also looked up lies behind the output of the embeddings."""
    nodes = {id(t.grad_fn): t.grad_fn for t in tensors if t.grad_fn is not None}
    handles = [node.register_prehook(_nothing_more) for node in nodes.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nothing_more(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if grad is None else torch.zeros_like(grad) for grad in grads)


def _of_parent(state: State, parent: State, grad: Tensor) -> Tensor:
    """The gradient of the tensor that this one was taken from."""
    grad = grad.to(parent.dtype)
    if state.ids.numel() == parent.ids.numel() and torch.equal(state.ids.reshape(-1), parent.ids.reshape(-1)):
        return grad.reshape(parent.shape)
    place = {int(row): at for at, row in enumerate(parent.ids.reshape(-1).tolist())}
    at = torch.tensor([place[int(row)] for row in state.ids.reshape(-1).tolist()], dtype=torch.int64)
    whole = grad.new_zeros(parent.ids.numel(), grad.shape[-1])
    return whole.index_add_(0, on(at, grad.device), grad.reshape(-1, grad.shape[-1])).view(parent.shape)


def _promised(state: State, leaves: tuple[Tensor, ...]) -> PromisedRows:
    """The tensor of a state, with a node in the graph if any of the leaves wants a gradient."""
    with torch._C.DisableTorchFunctionSubclass():
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
            promised: PromisedRows = _Promise.apply(state, *leaves)
        else:
            promised = _wrapper(state)
        promised.state = state
        promised.own_node = promised.grad_fn
    return promised


def _wrapper(state: State) -> PromisedRows:
    wrapper: PromisedRows = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        PromisedRows, state.shape, dtype=state.dtype, device=state.source.device
    )
    wrapper.state = state
    return wrapper


def _node_of(promised: PromisedRows) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return promised.grad_fn


def positional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As handlers expect them: what torch's functions call input comes first."""
    if args or "input" not in kwargs:
        return args, kwargs
    return (kwargs["input"],), {name: value for name, value in kwargs.items() if name != "input"}


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def materialized(value: Any, reader: str = OTHER) -> Any:
    """Ordinary tensors for every PromisedRows in a value, lists, tuples and dicts included."""
    return _replaced(value, lambda promised: promised.materialize(reader))


def _values(value: Any) -> Any:
    return _replaced(value, lambda promised: promised.state.materialize().detach())


def _replaced(value: Any, by: Callable[[PromisedRows], Tensor]) -> Any:
    if isinstance(value, PromisedRows):
        return by(value)
    if isinstance(value, dict):
        return {key: _replaced(item, by) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_replaced(item, by) for item in value)
    return value
