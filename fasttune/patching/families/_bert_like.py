"""What BERT and its relatives share: post-norm layers.

A relative names its classes (they must live in its own file, under their stock names, for copies to find them), says
how its embeddings count positions and where its language-model head is; `bert_like` makes the family of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttune import ops
from fasttune.patching.families._leaves import common_leaves
from fasttune.patching.families.spec import Family, Replacement
from fasttune.patching.layers.attention import (
    across,
    attend,
    fills,
    fresh_cache,
    into_cache,
    layout_for_attention,
)
from fasttune.patching.layers.entry import mask_for_stock, ordinary, promise
from fasttune.patching.layers.frozen import Norm, Unknown, activation, known, linear, probability
from fasttune.patching.layers.leaves import (
    Embedding,
    why_no_embedding,
    why_no_layer_norm,
    why_no_norm_of_embeddings,
)
from fasttune.patching.layers.patched import Patched
from fasttune.patching.layers.tied import lookup_view
from fasttune.patching.padding.layout import Layout
from fasttune.patching.premises.known import HARMLESS, stock_class, why_replaced, why_unknown, why_watched
from fasttune.patching.promises.tensor import PromisedRows


class PostNorm:
    """As it was when called: a = norm(dropout(out(attention(x))) + x), norm(dropout(down(act(up(a)))) + a)."""

    def __init__(self, layer: Any) -> None:
        attention, attend = layer.attention, layer.attention.self
        names = type(layer).__name__.removesuffix("Layer")
        for module, suffix in (
            (attention, "Attention"),
            (attend, "SelfAttention"),
            (attention.output, "SelfOutput"),
            (layer.intermediate, "Intermediate"),
            (layer.output, "Output"),
        ):
            cls = stock_class(type(module))
            if cls.__name__ != f"{names}{suffix}" or not cls.__module__.startswith("transformers.models."):
                raise Unknown(f"{cls.__name__} is not stock's")
            why = why_watched(module, HARMLESS if module is attend else ()) or why_replaced(cls)
            if why is not None:
                raise Unknown(why)
        if layer.chunk_size_feed_forward:
            raise Unknown("chunk_size_feed_forward")
        if why_replaced(stock_class(type(layer))) or "feed_forward_chunk" in layer.__dict__:
            raise Unknown(f"the forward of {type(layer).__name__} was replaced")
        patch = layer._fasttune
        self.backend = patch.backend
        self.head_dim, self.scale = attend.attention_head_size, float(attend.scaling)
        self.query, self.key, self.value = (linear(part) for part in (attend.query, attend.key, attend.value))
        self.out, self.norm1 = linear(attention.output.dense), Norm(attention.output.LayerNorm)
        self.up, self.down = linear(layer.intermediate.dense), linear(layer.output.dense)
        self.norm2 = Norm(layer.output.LayerNorm)
        self.act, self.activation = activation(layer.intermediate.intermediate_act_fn)
        self.fused_mlp = bool(self.activation) and patch.settings.options.mlp and type(self.up).__name__ == "Linear"
        known(attend.dropout, nn.Dropout)
        of_attention = float(attend.dropout.p) if attend.training else 0.0  # as stock: the module itself is not called
        self.dropouts = (of_attention, probability(attention.output.dropout), probability(layer.output.dropout))
        parts = (self.query, self.key, self.value, self.out, self.norm1, self.up, self.down, self.norm2)
        self.weights = tuple(weight for part in parts for weight in part.weights)

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
            bias = self.up.bias  # type: ignore[union-attr]
            middle = ops.bias_activation(product, bias, activation=self.activation, backend=self.backend)  # type: ignore[arg-type]
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

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        others = {"encoder_hidden_states": encoder_hidden_states, "past_key_values": past_key_values, **kwargs}
        attention = self.attention.self if hasattr(self.attention, "self") else None
        if attention is not None and hasattr(attention, "attention_head_size"):
            promised = promise(
                self,
                lambda: PostNorm(self),
                hidden_states,
                attention_mask,
                attention=attention,
                heads=attention.num_attention_heads,
                head_dim=attention.attention_head_size,
                arguments=others,
            )
            if promised is not None:
                return promised
            attention_mask = mask_for_stock(hidden_states, attention_mask, attention, kwargs)
        if not isinstance(getattr(getattr(self, "crossattention", None), "self", None), CrossAttention):
            (encoder_hidden_states,) = ordinary(encoder_hidden_states)
        hidden_states, attention_mask, encoder_attention_mask = ordinary(
            hidden_states, attention_mask, encoder_attention_mask
        )
        out: Tensor = super().forward(
            hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values, **kwargs
        )
        return out


class SelfAttention(Patched):
    """Self-attention without a T×T tensor, in layers that run as they stand."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        layout = None
        fresh = fresh_cache(past_key_values, self.layer_idx)
        if fresh and hidden_states.dim() == 3 and 0 not in hidden_states.shape:
            layout = layout_for_attention(self, hidden_states, attention_mask, self.attention_head_size, kwargs)
        if layout is None:
            return super().forward(hidden_states, attention_mask, past_key_values, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        query, key, value = (f(hidden_states).view(shape) for f in (self.query, self.key, self.value))
        into_cache(past_key_values, key.transpose(1, 2), value.transpose(1, 2), self.layer_idx)
        p = self.dropout.p if self.training else 0.0
        out = attend(query, key, value, layout, scale=self.scaling, dropout_p=p, backend=self._fasttune.backend)
        return out.flatten(2), None


class CrossAttention(Patched):
    """Cross-attention without a T×T tensor, over the encoder states that are not padding."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if fills(past_key_values, self.layer_idx) and encoder_hidden_states is not None and hidden_states.dim() == 3:
            heads = (-1, self.attention_head_size)
            out = across(
                self,
                self.query(hidden_states).unflatten(-1, heads),
                encoder_hidden_states,
                lambda states: (self.key(states).unflatten(-1, heads), self.value(states).unflatten(-1, heads)),
                past_key_values,
                attention_mask,
                rowwise=all(why_unknown(part, nn.Linear) is None for part in (self.key, self.value)),
                scale=self.scaling,
                dropout_p=self.dropout.p if self.training else 0.0,
                arguments=kwargs,
            )
            if out is not None:
                return out.flatten(2), None
        return super().forward(hidden_states, encoder_hidden_states, attention_mask, past_key_values, **kwargs)


class DenseDropoutAddNorm(Patched):
    """LayerNorm(dropout(dense(x)) + residual): what ends attention and what ends the MLP."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        patch, norm = self._fasttune, self.LayerNorm
        why = why_unknown(self.dropout, nn.Dropout) or why_unknown(norm, nn.LayerNorm)
        why = why or why_replaced(stock_class(type(self)))
        if why is not None or not patch.fused(hidden_states):
            if why is not None:
                patch.aside(why)
            return super().forward(hidden_states, input_tensor)
        patch.note()
        return ops.dropout_add_layer_norm(
            self.dense(hidden_states),
            input_tensor,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            dropout_p=self.dropout.p if self.dropout.training else 0.0,
            backend=patch.backend,
        )


class DenseGelu(Patched):
    """act(dense(x)), the bias added in the activation's pass."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        patch, dense = self._fasttune, self.dense
        kind, why = activation_of(self.intermediate_act_fn)
        why = why or why_unknown(dense, nn.Linear) or why_replaced(stock_class(type(self)))
        if why is not None or dense.bias is None or not patch.fused(hidden_states):
            if why is not None:
                patch.aside(why)
            return super().forward(hidden_states)
        patch.note()
        product = F.linear(hidden_states, dense.weight)
        return ops.bias_activation(product, dense.bias, activation=kind, backend=patch.backend)  # type: ignore[arg-type]


class DenseGeluNorm(Patched):
    """LayerNorm(GELU(dense(x))): the transform of a masked-language-model head."""

    activation_name = "transform_act_fn"

    def forward(self, hidden_states: Tensor) -> Tensor:
        function = self.activation_of()
        transformed = transform(self, hidden_states, self.dense, function, self.LayerNorm)
        return super().forward(hidden_states) if transformed is None else transformed

    def activation_of(self) -> Any:
        return getattr(self, self.activation_name)


def transform(module: Any, hidden: Tensor, dense: Any, act: Any, norm: Any) -> Tensor | None:
    """LayerNorm(GELU(dense(hidden))), as promised rows of promised rows; None where the module has to run as it is."""
    patch = module._fasttune
    kind, why = gelu_of(act)
    why = why or why_unknown(norm, nn.LayerNorm) or why_replaced(stock_class(type(module)))
    if why is None and not patch.fused(hidden):
        return None
    if why is not None:
        patch.aside(why)
        return None
    patch.note()
    backend = patch.backend
    options: dict[str, Any] = {"eps": norm.eps, "approximate": kind, "backend": backend}
    weight, bias = norm.weight, norm.bias
    waits = isinstance(hidden, PromisedRows) and hidden.untouched() and bool(patch.settings.options.trim)
    if not waits and _may_wait(module, hidden):
        hidden, waits = _of_tensor(hidden), True
    if waits:
        try:
            inner = linear(dense)
        except Unknown as unknown:
            patch.aside(str(unknown))
        else:
            function = lambda rows, ids: ops.gelu_layer_norm(inner(rows, ids), weight, bias, **options)  # noqa: E731
            promised: PromisedRows = hidden.mapped(  # type: ignore[attr-defined]
                function, (*inner.weights, weight, bias), norm.normalized_shape[0]
            )
            return promised
    return ops.gelu_layer_norm(dense(hidden), weight, bias, **options)


def _may_wait(module: Any, hidden: Tensor) -> bool:
    """Whether a head in training may compute its transform for the rows that a loss reads."""
    return (
        module.training
        and module._fasttune.settings.options.loss
        and bool(module._fasttune.settings.options.trim)
        and torch.is_grad_enabled()
        and hidden.requires_grad
        and hidden.dim() == 3
        and not torch.compiler.is_compiling()
        and not isinstance(hidden, PromisedRows)
        and 0 not in hidden.shape
        and not module._fasttune.settings.sharded()
        and module._fasttune.fused(hidden)
    )


def _of_tensor(hidden: Tensor) -> PromisedRows:
    from fasttune.patching.layers.entry import source_of

    return PromisedRows.of(source_of(hidden), hidden.shape[:-1])


def activation_of(function: Any) -> tuple[str, str | None]:
    """(`ops.bias_activation`'s name of it, None), or why an activation cannot be fused."""
    try:
        _, kind = activation(function)
    except Unknown as unknown:
        return "", str(unknown)
    return kind, None if kind else f"its activation is {function!r}, which has no fused pass"


def gelu_of(function: Any) -> tuple[str, str | None]:
    """("none" or "tanh", None), or why an activation cannot be fused with a LayerNorm behind it."""
    kind, why = activation_of(function)
    approximate = {"gelu": "none", "gelu_tanh": "tanh"}.get(kind, "")
    return approximate, why if why or approximate else f"its activation is {function!r}, not GELU"


def why_no_gelu(name: str) -> Callable[[Any], str | None]:
    """A check for `Replacement.unsuited`: the activation held by attribute `name`, in front of a LayerNorm."""
    return _check(gelu_of, name)


def _check(of: Callable[[Any], tuple[str, str | None]], name: str) -> Callable[[Any], str | None]:
    def check(module: Any) -> str | None:
        _, why = of(getattr(module, name))
        return why if why is None or "hooks" not in why else None  # hooks may go again; they are seen at each call

    return check


class SumNormDropout(Patched):
    """dropout(LayerNorm(word + position + token type)), looked up, summed and normalised in one pass."""

    def positions(self, input_ids: Tensor, past: int) -> Tensor:
        """Position ids where the caller gave none, (1 or B, S)."""
        return self.position_ids[:, past : input_ids.shape[1] + past]

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        patch, norm, word, position, token_type = (
            self._fasttune,
            self.LayerNorm,
            self.word_embeddings,
            self.position_embeddings,
            self.token_type_embeddings,
        )
        why = "inputs_embeds" if input_ids is None else None
        for table in (word, position, token_type):
            why = why or why_unknown(table, nn.Embedding) or why_no_embedding(table)
        why = why or why_unknown(norm, nn.LayerNorm) or why_no_norm_of_embeddings(norm)
        why = why or why_unknown(self.dropout, nn.Dropout)
        why = why or why_replaced(stock_class(type(self)))
        if why is not None or not patch.fused(word.weight):
            if why is not None:
                patch.aside(why)
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length)
        assert input_ids is not None
        patch.note()
        if position_ids is None:
            position_ids = self.positions(input_ids, past_key_values_length)
        if token_type_ids is None:
            token_type_ids = self.token_type_ids.expand(position_ids.shape[0], -1).gather(1, position_ids)
        tied = lookup_view(word) if isinstance(word, Patched) else None
        out = ops.embedding(
            input_ids,
            word.weight if tied is None else tied[1],
            position_ids=position_ids.expand(input_ids.shape),
            position_weight=without_gradient_of_row(position.weight, position.padding_idx),
            token_type_ids=token_type_ids.expand(input_ids.shape),
            token_type_weight=without_gradient_of_row(token_type.weight, token_type.padding_idx),
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            dropout_p=self.dropout.p if self.dropout.training else 0.0,
            padding_idx=word.padding_idx,
            sparse_grad=tied is not None,
            backend=patch.backend,
        )
        if tied is not None:
            out._fasttune_tied = (tied[0], tied[2])  # type: ignore[attr-defined]
        return out


class _WithoutGradientOfRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, row: int) -> Tensor:
        ctx.row = row
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone()
        grad[ctx.row] = 0
        return grad, None


def without_gradient_of_row(weight: Tensor, row: int | None) -> Tensor:
    """The same weight; its row `row` gets no gradient (an Embedding's padding_idx). For small tables: it copies."""
    if row is None:
        return weight
    result: Tensor = _WithoutGradientOfRow.apply(weight, row)
    return result


def bert_like(
    name: str,
    stock: ModuleType,
    classes: Mapping[str, type[nn.Module]],
    *,
    prefix: str,
    pooled: tuple[str, ...],
    of_every_token: tuple[str, ...],
    vocabulary: str,
    transform: str,
    transform_covers: tuple[str, ...] = ("LayerNorm", "transform_act_fn"),
    transform_unsuited: Callable[[Any], str | None] = lambda module: None,
) -> Family:
    """The family of a BERT-like model.

    stock: its module in Transformers. classes: the replacements by stock name, `<prefix>SelfOutput` and so on.
    pooled, of_every_token: its heads. vocabulary: the attribute name of the projection to the vocabulary. transform:
    the class before it.
    """

    def replace(stock_name: str, group: str, operation: str, does: str, **more: Any) -> Replacement:
        return Replacement(getattr(stock, stock_name), classes[stock_name], group, operation, does, **more)

    heads = {head: getattr(stock, head) for head in (*pooled, *of_every_token)}
    return Family(
        name=name,
        heads=tuple(heads.values()),
        of_every_token=tuple(heads[head] for head in of_every_token),
        replacements=(
            replace(
                f"{prefix}Embeddings",
                "embeddings",
                "embedding",
                "lookups + sum + LayerNorm + dropout",
                covers=("position_embeddings", "token_type_embeddings", "LayerNorm", "dropout"),
                unsuited=lambda module: (
                    why_no_norm_of_embeddings(module.LayerNorm)
                    or why_no_embedding(module.word_embeddings)
                    or why_no_embedding(module.position_embeddings)
                    or why_no_embedding(module.token_type_embeddings)
                ),
            ),
            Replacement(
                nn.Embedding,
                Embedding,
                "embeddings",
                "embedding",
                "lookup with a deterministic gradient",
                only=("word_embeddings",),
                unsuited=why_no_embedding,
            ),
            replace(
                f"{prefix}SelfAttention",
                "attention",
                "attention",
                "attention without a T×T tensor",
                covers=("dropout",),
            ),
            replace(
                f"{prefix}CrossAttention",
                "attention",
                "attention",
                "cross-attention without a T×T tensor",
                covers=("dropout",),
            ),
            *(
                replace(
                    f"{prefix}{part}",
                    "norms",
                    "dropout_add_layer_norm",
                    "dropout + residual + LayerNorm",
                    unsuited=lambda module: why_no_layer_norm(module.LayerNorm),
                    covers=("LayerNorm", "dropout"),
                )
                for part in ("SelfOutput", "Output")
            ),
            replace(
                f"{prefix}Intermediate",
                "mlp",
                "bias_activation",
                "bias + activation",
                covers=("intermediate_act_fn",),
                unsuited=_check(activation_of, "intermediate_act_fn"),
            ),
            replace(
                transform,
                "mlp",
                "gelu_layer_norm",
                "GELU + LayerNorm",
                covers=transform_covers,
                unsuited=transform_unsuited,
            ),
            replace(
                f"{prefix}Layer",
                "packing or trim",
                "",
                "padding left out, last layer for rows that are read",
                pays_in_torch=True,
            ),
            *common_leaves(vocabulary),
        ),
        layers=lambda model: model.base_model.encoder.layer,
    )
