"""Sources of promised rows: matrices (count, features) of which any rows can be computed, any number of times.

A source remembers what it has computed, but does not keep it alive: the tensor that was handed out does, through its
shelf, and autograd keeps what backward needs. Whoever holds on to a step's outputs does not hold on to the step.

Shape legend: ids int64 (R,) on the CPU, rising, number the rows of the padded batch; rows (R, features).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from fasttune.ops.packing import gather_rows
from fasttune.patching.promises.moment import Moment, Weights
from fasttune.patching.promises.origins import Origins

if TYPE_CHECKING:
    from fasttune.patching.padding.layout import Layout


class Shelf(list[Any]):
    """What a promised tensor keeps alive for its source."""

    __slots__ = ("__weakref__",)


class RowSource:
    """count rows of `features`, computed on request, always the same values.

    leaves: the tensors that the rows depend on and that may want a gradient. tied: the weight that a lookup left an
    alias of for the head, and this alias (fasttune.ops.tied).
    """

    count: int
    features: int
    dtype: torch.dtype
    device: torch.device
    leaves: tuple[Tensor, ...] = ()
    tied: tuple[Tensor, Tensor] | None = None
    padded = False  # whether some rows are at padding, and so of little use to most readers
    late = True  # whether its promise's gradient may be asked for after rows were read; else that raises
    puts_together = False  # whether `compute` puts rows together that went through `part`
    holds_itself = False  # whether the rows are there for as long as the source is

    def __init__(self, weights: Iterable[Tensor | None]) -> None:
        self.moment = Moment(self.device)
        self.weights = Weights(weight for weight in weights if weight is not None)
        self._shelf: weakref.ref[Shelf] | None = None
        self._done: list[tuple[Tensor | None, TensorWeakRef]] = []
        self.origins = Origins()

    def shelf(self) -> Shelf:
        """What keeps computed rows alive; belongs to the tensor that is handed out."""
        shelf = self._shelf() if self._shelf is not None else None
        if shelf is None:
            shelf = Shelf()
            self._shelf = weakref.ref(shelf)
        return shelf

    def rows(self, ids: Tensor | None) -> Tensor:
        """(len(ids), features), or all rows in order for None. Rows that were computed before are not again."""
        if ids is not None and ids.numel() == self.count:
            ids = None
        with self.moment.again(), self.weights.wanting():
            known = self._known(ids)
            if known is not None:
                return known
            if ids is not None:
                return self._with_others(ids)
            return self.keep(None, self._computed(None))

    def read(self, ids: Tensor | None) -> Tensor:
        """As `rows`, for a reader who comes at any time: raises RuntimeError if a weight that these rows depend on was
        written since, for then the values of the forward pass are gone."""
        if self._known(ids) is None:
            self.check(ids)
        return self.rows(ids)

    def forget(self, rows: Tensor) -> None:
        """Remembers nothing any more that lies in the memory of these rows."""
        address = rows.untyped_storage().data_ptr()
        self._done = [
            (had, ref)
            for had, ref in self._done
            if (kept := ref()) is not None and kept.untyped_storage().data_ptr() != address
        ]

    def anew(self) -> RowSource:
        """The same rows, of which nothing that was computed since they were promised is used again."""
        twin = copy.copy(self)
        twin._done, twin._shelf, twin.origins = [], None, Origins()
        return twin

    def head_weight(self, weight: Tensor) -> Tensor:
        """What a vocabulary projection multiplies by: the weight itself, unless the lookup left an alias for it."""
        return self.tied[1] if self.tied is not None and self.tied[0] is weight else weight

    def told(self, reader: str) -> None:
        """Somebody reads all rows, in a way that is not understood: for the report."""

    def check(self, ids: Tensor | None) -> None:
        """Raises RuntimeError if rows can no longer be computed as they were."""
        self.weights.check()

    def _with_others(self, ids: Tensor) -> Tensor:
        """The rows at ids, of which some may have been computed before."""
        for had, reference in self._done:
            rows = reference()
            if rows is None or had is None:
                continue
            among = torch.isin(ids, had)
            if not bool(among.any()):
                continue
            old = rows.index_select(0, on(torch.searchsorted(had.contiguous(), ids[among]), rows.device))
            missing = ids[~among]
            if missing.numel() == 0:
                return old
            new = self._with_others(missing)
            order = torch.cat((among.nonzero(), (~among).nonzero())).squeeze(1).argsort()
            return torch.cat((old, new)).index_select(0, on(order, old.device))
        return self.keep(ids, self._computed(ids))

    def _computed(self, ids: Tensor | None) -> Tensor:
        rows = self.compute(ids)
        if not self.puts_together:
            self.origins.add(ids, rows)
        return rows

    def part(self, ids: Tensor | None, rows: Tensor) -> Tensor:
        """Rows that `compute` may put together with others."""
        self.origins.add(ids, rows)
        shelf = self._shelf() if self._shelf is not None else None
        if shelf is not None and rows.requires_grad:
            shelf.append(rows)
        return rows

    def _known(self, ids: Tensor | None) -> Tensor | None:
        for had, reference in self._done:
            rows = reference()
            if rows is None:
                continue
            if had is None:
                return rows if ids is None else take_rows(rows, ids)
            if ids is not None and had.numel() == ids.numel() and torch.equal(had, ids):
                return rows
        return None

    def keep(self, ids: Tensor | None, rows: Tensor) -> Tensor:
        """Remembers rows for as long as the tensor that was handed out, or backward, keeps them."""
        self._done = [(had, ref) for had, ref in self._done if ref() is not None]
        self._done.append((ids, TensorWeakRef(rows)))
        shelf = self._shelf() if self._shelf is not None else None
        if shelf is not None:
            shelf.append(rows)
        return rows

    def compute(self, ids: Tensor | None) -> Tensor:
        """As `rows`, without memory."""
        raise RuntimeError(f"{type(self).__name__} does not say how to compute its rows.")

    def is_gone(self, layout: Layout) -> bool:
        """Whether the real rows of a layout would have to be computed again."""
        return False

    def real(self, layout: Layout) -> Tensor:
        """The T real rows of a layout, in its order."""
        return self.rows(None if layout.full else layout.real_ids)


class TensorRows(RowSource):
    """Rows of a tensor that exists."""

    holds_itself = True

    def __init__(self, tensor: Tensor) -> None:
        self.features, self.dtype, self.device = tensor.shape[-1], tensor.dtype, tensor.device
        self.matrix = tensor.reshape(-1, tensor.shape[-1])
        self.count = self.matrix.shape[0]
        self.leaves = (self.matrix,) if tensor.requires_grad else ()
        super().__init__(())

    def rows(self, ids: Tensor | None) -> Tensor:
        if ids is None or ids.numel() == self.count:
            return self.matrix
        with self.moment.again():  # a checkpointed layer saves the same in both runs, wherever its input lies
            return take_rows(self.matrix, ids)


class MappedRows(RowSource):
    """function(rows, ids) of another source's rows, where each row depends on its own row alone: a LayerNorm, a linear
    layer, a dropout, which goes by the rows' numbers ids int64 (R,) (None: all)."""

    def __init__(
        self,
        source: RowSource,
        function: Callable[[Tensor, Tensor | None], Tensor],
        weights: tuple[Tensor | None, ...],
        features: int,
        dtype: torch.dtype,
    ) -> None:
        self.source, self.function = source, function
        self.count, self.features, self.dtype, self.device = source.count, features, dtype, source.device
        self.tied, self.padded, self.late = source.tied, source.padded, source.late
        self._shelf_below = source.shelf()  # what is computed there is still to be read
        below = source.leaves if source.moment.gradient else ()
        self.leaves = below + tuple(w for w in weights if w is not None and w.requires_grad)
        super().__init__(weights)

    def anew(self) -> RowSource:
        twin: Any = super().anew()
        twin.source = self.source.anew()
        return twin

    def told(self, reader: str) -> None:
        self.source.told(reader)

    def check(self, ids: Tensor | None) -> None:
        super().check(ids)
        self.source.check(ids)

    def compute(self, ids: Tensor | None) -> Tensor:
        return self.function(self.source.rows(ids), ids)


def on(ids: Tensor, device: torch.device) -> Tensor:
    """ids, which are on the CPU, on a device."""
    return ids if device.type == "cpu" else ids.to(device, non_blocking=True)


def take_rows(x: Tensor, ids: Tensor) -> Tensor:
    """x[ids] for distinct ids on the CPU; backward copies."""
    return gather_rows(x, on(ids, x.device))
