"""A transformer layer's output as promised rows: real tokens packed side by side, padding and unread rows on demand.

A layer that is given a tensor of hidden states hands out a promise. The next layer reads all real rows of it: they are
computed at once, fused, without padding. A head reads few: keys and values are computed for all real rows, the rest for
those alone. Rows at padding are queries over the real keys of their sequence, and are seen by nobody, so they can be
computed afterwards, few or all. Which layer is the last one, who reads which rows, and whether anybody reads padding
need not be known. (Where they see all columns of their row instead, those at padding too, the layer's input is needed
at all of these.)

Dropout goes by the numbers that rows have in the padded batch and by seeds that are drawn where the layer is called, so
a row is the same whenever it is read and whatever is read with it.

Shape legend: B rows of S tokens, T of them real; hidden states (T, E) packed, (R, E) of chosen rows; key and value
(T, H, D); ids (R,) on the CPU number rows of the padded batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from fasttune import ops
from fasttune.ops._random import draw_seed, repeating
from fasttune.patching.layers.real_keys import over_all_columns, over_real_keys
from fasttune.patching.padding.layout import Layout
from fasttune.patching.promises.source import RowSource, on, take_rows

WORTH_IT = 0.75  # of the real rows: above it, leaving some out saves less than picking the others costs


class Frozen(Protocol):
    """A layer as it was when it was called: weights, probabilities, constants; functions of rows."""

    @property
    def weights(self) -> tuple[Tensor, ...]: ...

    @property
    def dropouts(self) -> tuple[float, ...]:
        """In the order in which the layer draws their seeds; attention's first."""

    def options(self, layout: Layout) -> dict[str, Any]:
        """Of `ops.attention` over the packed rows of a layout, but for causal and window."""

    def whole(self, hidden: Tensor, layout: Layout) -> tuple[Tensor, tuple[Tensor, ...]]:
        """hidden (T, E) -> (the layer's output (T, E), what backward keeps of keys and values)."""

    def kept(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """key and value (T, H, D), of what backward keeps of them."""

    def keys_and_values(self, hidden: Tensor, row_ids: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (T, E) -> key and value (T, H, D)."""

    def values(self, rows: Tensor, row_ids: Tensor) -> Tensor:
        """rows (R, E) -> value (R, H, D)."""

    def queries(self, rows: Tensor, row_ids: Tensor) -> Tensor:
        """rows (R, E) -> (R, H, D)."""

    def terms(self, query: Tensor, key: Tensor) -> dict[str, Any]:
        """query (R, H, D), key (T, H, D) -> those options of `ops.attention` that go by them."""

    def finish(self, attended: Tensor, rows: Tensor, row_ids: Tensor | None) -> Tensor:
        """attended (R, H * D), the layer's input rows (R, E) -> the layer's output (R, E)."""


class LayerRows(RowSource):
    """layer(input) under a layout. dtype: of the output."""

    puts_together = True

    def __init__(self, layer: Frozen, input: RowSource, layout: Layout, dtype: torch.dtype) -> None:
        self.layer, self.input, self.layout = layer, input, layout
        self.count, self.features = layout.shape[0] * layout.shape[1], input.features
        self.dtype, self.device, self.tied, self.padded = dtype, input.device, input.tied, not layout.full
        self.seeds = [draw_seed(self.device) for p in layer.dropouts if p > 0.0]
        self.leaves = input.leaves + tuple(weight for weight in layer.weights if weight.requires_grad)
        self._kept: tuple[TensorWeakRef, ...] | None = None
        self._strong: list[Tensor] = []  # what nothing else keeps: see `_hold`
        self.on_few: Callable[[], None] = _nothing  # told when some real rows are computed without the others
        self.on_all: Callable[[str], None] = _nothing  # told who reads every row, those at padding included
        super().__init__(layer.weights)
        if not input.holds_itself:
            self._strong = [input.real(layout)]

    def anew(self) -> RowSource:
        twin: Any = super().anew()
        twin._kept, twin._strong, twin.on_few, twin.on_all = None, list(self._strong), _nothing, _nothing
        return twin

    # The real rows

    def real(self, layout: Layout) -> Tensor:
        if layout is not self.layout:
            return super().real(layout)
        known = self._known_real()
        if known is not None:
            return known
        with self.moment.again(), self.weights.wanting():
            return self.now()

    def now(self) -> Tensor:
        """All real rows, computed under whatever is in force: for the forward pass itself."""
        if self._alive() is not None:
            rows = self._chosen(None)
        else:
            hidden = self.input.real(self.layout)
            with repeating(self.seeds):
                rows, kept = self.layer.whole(hidden, self.layout)
            self._hold(kept)
            self.origins.add(self._real_ids, rows)
        self._strong.clear()
        return self.keep(self._real_ids, rows)

    @property
    def _real_ids(self) -> Tensor | None:
        return None if self.layout.full else self.layout.real_ids

    def _known_real(self) -> Tensor | None:
        return self._known(self._real_ids)

    def _alive(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values, if they are still there."""
        if self._kept is None:
            return None
        tensors = tuple(tensor for kept in self._kept if (tensor := kept()) is not None)
        return self.layer.kept(tensors) if len(tensors) == len(self._kept) else None

    def _hold(self, kept: tuple[Tensor, ...]) -> None:
        """Backward keeps keys and values, and lets go of them; only without backward they are kept here, while rows of
        this layer are still to come."""
        self._kept = tuple(TensorWeakRef(tensor) for tensor in kept)
        if not kept[0].requires_grad:
            self._strong = [*self._strong[:1], *kept]

    def _keys_and_values(self) -> tuple[Tensor, Tensor]:
        alive = self._alive()
        if alive is None:
            alive = self.layer.keys_and_values(self.input.real(self.layout), self.layout.packed.indices)
            self._hold(alive)
        return alive

    def keys_and_values_of_all(self) -> tuple[Tensor, Tensor]:
        """Of every token of the padded batch, as a cache has them: (B * S, H, D)."""
        self.check(None)
        with self.moment.again(), self.weights.wanting():
            return self.layer.keys_and_values(self.input.rows(None), torch.arange(self.count, device=self.device))

    def _chosen(self, ids: Tensor | None) -> Tensor:
        """Real rows at ids; None: all of them, packed."""
        key, value = self._keys_and_values()
        packed, hidden = self.layout.packed, self.input.real(self.layout)
        options = self.layer.options(self.layout) | {"causal": self.layout.causal, "window": self.layout.window}
        if ids is None:
            rows, row_ids = hidden, packed.indices
        else:
            self.on_few()
            places = self.layout.places.index_select(0, ids)
            rows, row_ids = take_rows(hidden, places), on(ids, self.device)
            options |= self._queries_at(places)
        with repeating(self.seeds):
            query = self.layer.queries(rows, row_ids)
            attended = ops.attention(query, key, value, **options, **self.layer.terms(query, key))
            found = self.layer.finish(attended.flatten(1), rows, row_ids)
        return self.part(self._real_ids if ids is None else ids, found)

    def _queries_at(self, places: Tensor) -> dict[str, Tensor]:
        """For attention: which packed rows (R,), rising, the queries are."""
        ends = self.layout.lengths.cumsum(0)
        sequence = torch.bucketize(places, ends, right=True)
        begins = ends - self.layout.lengths
        counts = torch.bincount(sequence, minlength=ends.numel())
        offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32)
        positions = places - begins.index_select(0, sequence)
        return {
            "cu_seqlens_q": on(offsets, self.device),
            "positions_q": on(positions.to(torch.int32), self.device),
        }

    # Any rows

    def told(self, reader: str) -> None:
        if self.padded or self.moment.gradient:
            self.on_all(reader)

    def check(self, ids: Tensor | None) -> None:
        super().check(ids)
        wanted = self.layout.places if ids is None else self.layout.places[ids]
        if self.layout.real is not None and bool((wanted < 0).any()):
            mates = self.layout.blind_sees_all and ids is not None
            self.input.check(self.layout.row_mates(ids, real=True) if mates else ids)  # type: ignore[arg-type]
        elif self._known_real() is None and self.input.is_gone(self.layout):
            self.input.check(self._real_ids)

    @property
    def gone(self) -> bool:
        """Whether the real rows would have to be computed again."""
        return self._known_real() is None

    def is_gone(self, layout: Layout) -> bool:
        return self.gone

    def compute(self, ids: Tensor | None) -> Tensor:
        if self.layout.full and ids is None:
            return self.real(self.layout)
        wanted = torch.arange(self.count) if ids is None else ids
        real = self.layout.places.index_select(0, wanted) >= 0
        real_ids, padding = wanted[real], wanted[~real]
        parts = []
        if real_ids.numel() == self.layout.total:
            parts.append(self.real(self.layout))
        elif real_ids.numel() > WORTH_IT * self.layout.total:
            parts.append(take_rows(self.real(self.layout), self.layout.places.index_select(0, real_ids)))
        elif real_ids.numel():
            known = self._known_real()
            parts.append(
                self._chosen(real_ids)
                if known is None
                else take_rows(known, self.layout.places.index_select(0, real_ids))
            )
        if padding.numel():
            parts.append(self.at_padding(padding))
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return self._chosen(wanted)
        order = torch.cat((real.nonzero(), (~real).nonzero())).squeeze(1).argsort()
        return take_rows(torch.cat(parts), order)

    def at_padding(self, ids: Tensor) -> Tensor:
        """The rows at padding (P,), rising."""
        known = self._known(ids)
        if known is not None:
            return known
        return self.advance(ids)[1]

    def advance(self, ids: Tensor) -> tuple[Tensor | None, Tensor]:
        """(real rows, if they had to be computed again; rows at padding ids). Keys and values that are gone are
        computed anew, layer by layer, each once."""
        with self.moment.again(), self.weights.wanting():
            hidden: Tensor | None = None
            below = self.input
            needed = self.layout.row_mates(ids, real=False) if self.layout.blind_sees_all else ids
            if self._alive() is None and isinstance(below, LayerRows) and below.layout is self.layout and below.gone:
                hidden, rows = below.advance(needed)
            else:
                rows = self.input.rows(needed)
            again: Tensor | None = None
            alive = self._alive()
            if alive is None:
                hidden = self.input.real(self.layout) if hidden is None else hidden
                with repeating(self.seeds):
                    again, kept = self.layer.whole(hidden, self.layout)
                self.part(self._real_ids, again)
                alive = self.layer.kept(kept)
            over = self._padding_over_all if self.layout.blind_sees_all else self._padding_over
            return again, self.part(ids, over(rows, ids, alive))

    def _padding_over(self, rows: Tensor, ids: Tensor, keys_and_values: tuple[Tensor, Tensor]) -> Tensor:
        key, value = keys_and_values
        row_ids, options = on(ids, self.device), self.layer.options(self.layout)
        with repeating(self.seeds):
            query = self.layer.queries(rows, row_ids)
            attended = over_real_keys(query, ids, key, value, self.layout, options)
            return self.layer.finish(attended.flatten(1), rows, row_ids)

    def _padding_over_all(self, rows: Tensor, ids: Tensor, keys_and_values: tuple[Tensor, Tensor]) -> Tensor:
        """rows: of the layer's input, all that are at padding in the rows of the batch that ids lie in."""
        padding = self.layout.row_mates(ids, real=False)
        row_ids, options = on(ids, self.device), self.layer.options(self.layout)
        with repeating(self.seeds):
            at_padding = self.layer.values(rows, on(padding, self.device))
            attended = over_all_columns(ids, keys_and_values[1], at_padding, self.layout, options)
            attended = _with_zeros_for(self.layer.weights, attended)
            rows = take_rows(rows, torch.searchsorted(padding, ids))
            return self.layer.finish(attended.flatten(1), rows, row_ids)


def _with_zeros_for(weights: tuple[Tensor, ...], attended: Tensor) -> Tensor:
    """The same; a weight that it does not depend on gets a gradient of 0, as from stock, instead of none."""
    if not torch.is_grad_enabled():
        return attended
    return attended + sum(weight[(0,) * weight.dim()] * 0.0 for weight in weights if weight.requires_grad)


def _nothing(*_: str) -> None:
    pass
