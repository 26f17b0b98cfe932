"""Where the rows of a source entered the graph: whoever asks for the gradient of a promised tensor after rows of it
were read (by the next layer, a pooler, a loss) gets it from there.

Nothing is kept alive, and nothing is done to the graph, until somebody asks. The gradient of the promised tensor is
then what reaches these rows, each at its place, and what reaches the tensor's own node.

Shape legend: ids (R,) on the CPU number rows of the source; rows (R, features).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef

TOO_LATE = (
    "fasttune: the gradient of values that are computed on demand was asked for after something was made of them,"
    " in a way that left no trace. Ask before that, in a forward hook of the layer, say, or patch with"
    " fasttune.patch(model, loss=False, trim=False, packing=False)."
)


class _Sign:
    """Lies in the metadata of a node of the graph, and is gone when the node is."""

    __slots__ = ("__weakref__",)


class Hook:
    """Somebody's hook, which is to see the whole gradient, once in a backward pass: where two parts of it come, or
    another part than before, it raises (a checkpoint's backward is a pass of its own). handle: of its registration
    with the promised tensor itself; removed there, it is removed."""

    def __init__(self, function: Callable[[Tensor], Tensor | None]) -> None:
        self.function = function
        self.handle: RemovableHandle | None = None
        self._called: tuple[int, object] | None = None

    def __call__(self, grad: Tensor, part: object = None) -> Tensor | None:
        hooks = None if self.handle is None else self.handle.hooks_dict_ref()
        if hooks is not None and self.handle is not None and self.handle.id not in hooks:
            return None
        this = torch._C._current_graph_task_id()
        if self._called is not None and (self._called[0] == this or self._called[1] is not part):
            raise RuntimeError(TOO_LATE)
        self._called = this, part
        return self.function(grad)


class Origins:
    """The rows of one source that were computed with gradients so far.

    wanted: whether somebody asked for their gradients, of those to come too.
    """

    def __init__(self) -> None:
        self._found: list[tuple[Tensor | None, TensorWeakRef, weakref.ref[_Sign]]] = []
        self._keep: weakref.ref[list[Any]] | None = None
        self._hooks: list[tuple[Hook, torch.Size, torch.dtype]] = []

    @property
    def wanted(self) -> bool:
        return self._keep is not None

    def add(self, ids: Tensor | None, rows: Tensor) -> None:
        """ids: None for all rows in order."""
        if rows.grad_fn is None:
            return
        sign = _Sign()
        metadata: dict[str, Any] = rows.grad_fn.metadata  # type: ignore[assignment]
        metadata.setdefault("fasttune", []).append(sign)
        self._found.append((ids, TensorWeakRef(rows), weakref.ref(sign)))
        if self._keep is not None:
            self._retain(rows)
        for hook, shape, dtype in self._hooks:
            _register(hook, shape, dtype, ids, rows)

    def alive(self) -> list[tuple[Tensor | None, Tensor]]:
        """(ids, rows) of all that may still pass a gradient on; raises RuntimeError if some of them cannot be had."""
        found = []
        for ids, reference, sign in self._found:
            rows = reference()
            if rows is not None:
                found.append((ids, rows))
            elif sign() is not None:
                raise RuntimeError(TOO_LATE)
        return found

    def ask(self, keep: Any) -> None:
        """Their gradients are to be there after backward. keep: a list that lives as long as whoever asks; what it
        holds, it keeps alive."""
        if self._keep is None or self._keep() is not keep:
            found = self.alive()
            self._keep = weakref.ref(keep)
            for _, rows in found:
                self._retain(rows)

    def take_grads(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """(ids, gradient) of those that were asked for, which have none any more."""
        if self._keep is None:
            return []
        taken = []
        for ids, reference, _ in self._found:
            rows = reference()
            if rows is not None and rows.retains_grad:
                taken.append((ids, rows.grad))
                rows.grad = None
        return taken

    def _retain(self, rows: Tensor) -> None:
        keep = None if self._keep is None else self._keep()
        if keep is not None:
            rows.retain_grad()
            keep.append(rows)

    def hook(self, hook: Hook, shape: torch.Size, dtype: torch.dtype) -> None:
        """hook sees, and may change, the gradient of all rows of the source, of this shape (*lead, features)."""
        found = self.alive()
        self._hooks.append((hook, shape, dtype))
        for ids, rows in found:
            _register(hook, shape, dtype, ids, rows)


def _register(hook: Hook, shape: torch.Size, dtype: torch.dtype, ids: Tensor | None, rows: Tensor) -> None:
    part = object()

    def of_rows(grad: Tensor) -> Tensor | None:
        changed = hook(spread(grad, ids, shape).to(dtype), part)
        if changed is None:
            return None
        matrix = changed.reshape(-1, shape[-1])
        mine = matrix if ids is None else matrix.index_select(0, ids.to(grad.device))
        if torch.count_nonzero(matrix) != torch.count_nonzero(mine):
            raise RuntimeError(TOO_LATE)  # a gradient of rows that nobody read
        return mine.to(grad.dtype)

    rows.register_hook(of_rows)


def spread(grad: Tensor, ids: Tensor | None, shape: torch.Size) -> Tensor:
    """The gradient of some rows as one of all of them."""
    if ids is None:
        return grad.reshape(shape)
    whole = grad.new_zeros(shape.numel() // shape[-1], shape[-1])
    return whole.index_copy_(0, ids.to(grad.device), grad).view(shape)
