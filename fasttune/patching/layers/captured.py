"""What a layer of attention and MLP is made of, wherever it holds it, and what captures that.

A family says where its layer holds the modules (`Parts`); captured, they are functions of rows (`Captured`, of which
post_norm.py and pre_norm.py make the two kinds of layers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fasttune import ops
from fasttune.patching.layers.frozen import Linear, Norm, Unknown, activation, known, linear, probability
from fasttune.patching.layers.projections import Fused, Separate
from fasttune.patching.layers.relative import Relative
from fasttune.patching.padding.layout import Layout
from fasttune.patching.premises.known import HARMLESS, stock_class, why_replaced, why_watched


@dataclass(frozen=True)
class Parts:
    """The modules of a layer; None where it has none.

    inside: the modules between the layer and these, with the classes that they must be of: what they compute is done
        without calling them. attend: the one of them that attends.
    project: captures the projections. scale: of the scores; bias (H, 2 R + 1): by distance, added to them; relative:
        captures, for a layout, what disentangled attention adds to them.
    attention_dropout: an nn.Dropout, or a probability that holds while `attend` is training; calls_dropout: it is a
        module that is called, and its own mode holds. The other dropouts are an nn.Dropout or nn.Identity.
    gated: up gives two halves, and what goes down is act(first) * second, after gate_dropout.
    chunks: the layer's chunk_size_feed_forward.
    """

    inside: tuple[tuple[nn.Module, type], ...]
    attend: nn.Module
    project: Fused | Separate
    scale: float
    attention_dropout: Any
    out: Any
    out_dropout: Any
    norm1: Any
    up: Any
    act: Any
    down: Any
    down_dropout: Any
    norm2: Any
    gated: bool = False
    gate_dropout: Any = None
    chunks: int = 0
    bias: Tensor | None = None
    relative: Callable[[Layout], Relative] | None = None
    calls_dropout: bool = False


class Captured:
    """A layer as it was when it was called; raises Unknown where it is not what its class ships."""

    def __init__(self, layer: Any, parts: Parts, layout: Layout) -> None:
        _prove(layer, parts)
        patch, attend = layer._fasttune, parts.attend
        self.backend, self.scale, self.projection = patch.backend, float(parts.scale), parts.project
        self.out, self.up, self.down = linear(parts.out), linear(parts.up), linear(parts.down)
        self.norm1, self.norm2 = _norm(parts.norm1), _norm(parts.norm2)
        self.act, self.kind = activation(parts.act)
        self.gated = parts.gated
        self.fused_mlp = bool(self.kind) and patch.settings.options.mlp and (self.gated or type(self.up) is Linear)
        of_attention = parts.attention_dropout
        if isinstance(of_attention, nn.Module):
            of_attention = known(of_attention, nn.Dropout).p
        # As stock, which reads the probability and its own mode: the module itself is mostly not called.
        training = (parts.attention_dropout if parts.calls_dropout else attend).training
        of_attention = float(of_attention) if training else 0.0
        others = (_probability(of) for of in (parts.out_dropout, parts.gate_dropout, parts.down_dropout))
        self.dropouts = (of_attention, *others)
        captured = [part for part in (self.norm1, self.norm2, self.out, self.up, self.down) if part is not None]
        self.weights = tuple(weight for part in (self.projection, *captured) for weight in part.weights)
        self.bias = parts.bias
        if self.bias is not None:
            self.weights += (self.bias,)
        self.relative = None if parts.relative is None else parts.relative(layout)
        if self.relative is not None:
            self.weights += self.relative.weights

    def options(self, layout: Layout) -> dict[str, Any]:
        packed = layout.packed
        return {
            "scale": self.scale,
            "bias": self.bias,
            "dropout_p": self.dropouts[0],
            "cu_seqlens": packed.cu_seqlens,
            "max_seqlen": packed.max_seqlen,
            "backend": self.backend,
        }

    def before(self, rows: Tensor) -> Tensor:
        """What attention's projections are given of the layer's input rows (R, E)."""
        return rows

    def finish(self, attended: Tensor, rows: Tensor, row_ids: Tensor | None) -> Tensor:
        raise NotImplementedError

    def whole(self, hidden: Tensor, layout: Layout) -> tuple[Tensor, tuple[Tensor, ...]]:
        row_ids = layout.packed.indices
        options = self.options(layout) | {"causal": layout.causal, "window": layout.window}
        attended, kept = self.projection.attend(self.before(hidden), row_ids, options, self.terms)
        return self.finish(attended.flatten(1), hidden, row_ids), kept

    def kept(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return self.projection.kept(tensors)

    def keys_and_values(self, hidden: Tensor, row_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.projection.keys_and_values(self.before(hidden), row_ids, self.backend)

    def values(self, rows: Tensor, row_ids: Tensor) -> Tensor:
        return self.projection.values(self.before(rows), row_ids)

    def terms(self, query: Tensor, key: Tensor) -> dict[str, Any]:
        return {} if self.relative is None else self.relative(query, key)

    def queries(self, rows: Tensor, row_ids: Tensor) -> Tensor:
        return self.projection.queries(self.before(rows), row_ids, self.backend)

    def mlp(self, rows: Tensor, row_ids: Tensor | None) -> Tensor:
        """down(act(up(rows))), up's bias added in the activation's pass."""
        up: Any = self.up
        if not self.fused_mlp:
            middle = up(rows, row_ids)
            if self.gated:
                first, second = middle.chunk(2, -1)
                middle = self.act(first) * second
            else:
                middle = self.act(middle)
        elif self.gated:
            middle = ops.gated_activation(up(rows, row_ids), activation=self.kind, backend=self.backend)
        else:
            middle = ops.bias_activation(up.product(rows), up.bias, activation=self.kind, backend=self.backend)
        middle = ops.dropout(middle, dropout_p=self.dropouts[2], row_ids=row_ids, backend=self.backend)
        return self.down(middle, row_ids)


def _prove(layer: Any, parts: Parts) -> None:
    """Raises Unknown unless the modules between the layer and its parts, and the layer, do what their classes ship."""
    for module, cls in parts.inside:
        if stock_class(type(module)) is not cls:
            raise Unknown(f"{type(module).__name__} is not the {cls.__name__} it takes the place of")
        why = why_watched(module, HARMLESS if module is parts.attend else ()) or why_replaced(cls)
        if why is not None:
            raise Unknown(why)
    if parts.chunks:
        raise Unknown("chunk_size_feed_forward")
    if why_replaced(stock_class(type(layer))):
        raise Unknown(f"the forward of {type(layer).__name__} was replaced")
    for module in (layer, *(module for module, _ in parts.inside)):
        for name in ("feed_forward_chunk", "ff_chunk"):  # which a forward calls by name
            if name in module.__dict__:
                raise Unknown(f"{name} of {type(module).__name__} was replaced")


def _norm(module: Any) -> Norm | None:
    if type(module) is nn.Identity:
        known(module, nn.Identity)
        return None
    return None if module is None else Norm(module)


def _probability(module: Any) -> float:
    if type(module) is nn.Identity:
        known(module, nn.Identity)
        return 0.0
    return 0.0 if module is None else probability(module)
