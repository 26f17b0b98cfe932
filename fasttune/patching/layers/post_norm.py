"""A post-norm layer, as BERT has it: norm(dropout(down(act(up(a)))) + a) of a = norm(dropout(out(attention(x))) + x).

A family says where its layer holds the modules of this formula (`Parts`); captured, they are functions of rows
(`PostNorm`), and the layer hands out a promise of its output (`PromisedLayer`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fasttune import ops
from fasttune.patching.layers.entry import mask_for_stock, ordinary, promise
from fasttune.patching.layers.frozen import Norm, Unknown, activation, known, linear, probability
from fasttune.patching.layers.patched import Patched
from fasttune.patching.padding.layout import Layout
from fasttune.patching.premises.known import HARMLESS, stock_class, why_replaced, why_watched


@dataclass(frozen=True)
class Parts:
    """The modules of a post-norm layer, wherever it holds them.

    inside: the modules between the layer and these, with the classes that they must be of: what they compute is done
        without calling them. attend: the one of them that attends.
    scale: of the scores. attention_dropout, out_dropout, down_dropout: nn.Dropout, None where the layer has none.
    chunks: the layer's chunk_size_feed_forward.
    """

    inside: tuple[tuple[nn.Module, type], ...]
    attend: nn.Module
    head_dim: int
    scale: float
    query: Any
    key: Any
    value: Any
    attention_dropout: Any
    out: Any
    out_dropout: Any
    norm1: Any
    up: Any
    act: Any
    down: Any
    down_dropout: Any
    norm2: Any
    chunks: int = 0


class PostNorm:
    """The layer as it was when it was called; raises Unknown where it is not what its class ships."""

    def __init__(self, layer: Any, parts: Parts) -> None:
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
            for name in ("feed_forward_chunk", "ff_chunk"):  # called by forwards, replaced by nobody we know
                if name in module.__dict__:
                    raise Unknown(f"{name} of {type(module).__name__} was replaced")
        patch = layer._fasttune
        self.backend = patch.backend
        self.head_dim, self.scale = parts.head_dim, float(parts.scale)
        self.query, self.key, self.value = linear(parts.query), linear(parts.key), linear(parts.value)
        self.out, self.norm1 = linear(parts.out), Norm(parts.norm1)
        self.up, self.down, self.norm2 = linear(parts.up), linear(parts.down), Norm(parts.norm2)
        self.act, self.gelu = activation(parts.act)
        self.fused_mlp = bool(self.gelu) and patch.settings.options.mlp and type(self.up).__name__ == "Linear"
        known(parts.attention_dropout, nn.Dropout)
        # As stock, which reads the probability and its own mode: the module itself is not called.
        of_attention = float(parts.attention_dropout.p) if parts.attend.training else 0.0
        others = (0.0 if module is None else probability(module) for module in (parts.out_dropout, parts.down_dropout))
        self.dropouts = (of_attention, *others)
        captured = (self.query, self.key, self.value, self.out, self.norm1, self.up, self.down, self.norm2)
        self.weights = tuple(weight for part in captured for weight in part.weights)

    def whole(self, hidden: Tensor, layout: Layout) -> tuple[Tensor, tuple[Tensor, ...]]:
        row_ids = layout.packed.indices
        key, value = self.keys_and_values(hidden, row_ids)
        query = self.queries(hidden, row_ids)
        packed = layout.packed
        out = ops.attention(
            query,
            key,
            value,
            causal=layout.causal,
            scale=self.scale,
            dropout_p=self.dropouts[0],
            cu_seqlens=packed.cu_seqlens,
            max_seqlen=packed.max_seqlen,
            backend=self.backend,
        )
        return self.finish(out.flatten(1), hidden, row_ids), (key, value)

    def kept(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return tensors[0], tensors[1]

    def keys_and_values(self, hidden: Tensor, row_ids: Tensor) -> tuple[Tensor, Tensor]:
        heads = (-1, self.head_dim)
        return self.key(hidden, row_ids).unflatten(-1, heads), self.value(hidden, row_ids).unflatten(-1, heads)

    def queries(self, rows: Tensor, row_ids: Tensor) -> Tensor:
        return self.query(rows, row_ids).unflatten(-1, (-1, self.head_dim))

    def finish(self, attended: Tensor, rows: Tensor, row_ids: Tensor | None) -> Tensor:
        after = self._norm(self.norm1, self.out(attended, row_ids), rows, self.dropouts[1], row_ids)
        if self.fused_mlp:
            product = self.up.product(after)  # type: ignore[union-attr]
            middle = ops.bias_gelu(product, self.up.bias, approximate=self.gelu, backend=self.backend)  # type: ignore[union-attr, arg-type]
        else:
            middle = self.act(self.up(after, row_ids))
        return self._norm(self.norm2, self.down(middle, row_ids), after, self.dropouts[2], row_ids)

    def _norm(self, norm: Norm, x: Tensor, residual: Tensor, p: float, row_ids: Tensor | None) -> Tensor:
        if not norm.fused:
            return norm(ops.dropout(x, dropout_p=p, row_ids=row_ids, backend=self.backend) + residual, self.backend)
        options: dict[str, Any] = {"eps": norm.eps, "dropout_p": p, "row_ids": row_ids, "backend": self.backend}
        return ops.dropout_add_layer_norm(x, residual, norm.weight, norm.bias, **options)


class PromisedLayer(Patched):
    """A layer that hands out a promise of its output where it is known through and through."""

    heads = "num_attention_heads"  # what the attending module calls their number

    def parts(self) -> Parts:
        raise NotImplementedError

    def attends(self) -> Any:
        """The module that attends, None where something else stands in its place."""
        raise NotImplementedError

    def promised(self, hidden_states: Any, mask: Any, arguments: dict[str, Any]) -> tuple[Tensor | None, Any]:
        """(a promise of the output, or None where the layer has to run as it stands; the mask to hand it then).

        arguments: what else the layer was called with."""
        attention = self.attends()
        if attention is None:
            return None, mask
        head_dim = attention.attention_head_size
        out = promise(
            self,
            lambda: PostNorm(self, self.parts()),
            hidden_states,
            mask,
            attention=attention,
            heads=getattr(attention, self.heads),
            head_dim=head_dim,
            arguments=arguments,
        )
        return out, mask if out is not None else mask_for_stock(hidden_states, mask, attention, arguments)


class PromisedEncoderLayer(PromisedLayer):
    """One that is called with hidden states and a mask alone."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        out, attention_mask = self.promised(hidden_states, attention_mask, kwargs)
        if out is None:
            hidden_states, attention_mask = ordinary(hidden_states, attention_mask)
            out = super().forward(hidden_states, attention_mask, **kwargs)
        return out
