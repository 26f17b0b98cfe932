"""What BERT and its relatives share: post-norm layers whose fusions all fit on leaf modules.

A relative names its classes (they must live in its own file, under their stock names, for pickle to find them), says
how its embeddings count positions and where its language-model head is; `bert_like` makes the family of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttune import ops
from fasttune.ops.packing import PackedBatch
from fasttune.patching.attention import NAMES
from fasttune.patching.families._activations import gelu_kind, why_no_gelu
from fasttune.patching.last_layer import Chosen, on_demand, other_dropout
from fasttune.patching.layers import (
    DROPOUTS,
    LAYER_NORMS,
    Embedding,
    Patched,
    common_leaves,
    dropout_probability,
    mapped,
    may_defer,
    why_no_embedding,
    why_no_layer_norm,
)
from fasttune.patching.lazy_rows import LazyRows, TensorRows
from fasttune.patching.plain import why_not_plain
from fasttune.patching.plan import plan_of
from fasttune.patching.spec import Family, Replacement, RowReader
from fasttune.patching.stack import current_row_ids, entering, leaving, rows_numbered, why_hooked
from fasttune.patching.tied import lookup_view

EMBEDDINGS = (nn.Embedding, Embedding)


class DenseDropoutAddNorm(Patched):
    """LayerNorm(dropout(dense(x)) + residual): what ends attention and what ends the MLP."""

    def _why_not_plain(self) -> str | None:
        return why_not_plain(self.dropout, *DROPOUTS) or why_not_plain(self.LayerNorm, *LAYER_NORMS)

    def plain(self) -> bool:
        return self._why_not_plain() is None and self._fasttune.fused(self.LayerNorm.weight)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        patch, norm = self._fasttune, self.LayerNorm
        why = self._why_not_plain()
        if why is not None or not patch.fused(hidden_states):
            if why is not None:
                patch.aside(why)
            return super().forward(hidden_states, input_tensor)
        return ops.dropout_add_layer_norm(
            self.dense(hidden_states),
            input_tensor,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            dropout_p=dropout_probability(self.dropout),
            row_ids=current_row_ids(),
            backend=patch.backend,
        )


@dataclass
class LayerRows:
    """What the last layer has computed before anybody asks for rows: key and value (T, H, D)."""

    causal: bool
    key: Tensor
    value: Tensor


class PackedLayer(Patched):
    """A layer that takes padding out if it is the first, brings it back if it is the last, and as the last one computes
    only the rows that somebody reads."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        plan = plan_of(attention_mask)
        shape = (hidden_states.shape[0], hidden_states.shape[1]) if plan is None else plan.packed.shape
        if plan is not None and plan.across:
            hidden_states = entering(self, hidden_states, plan)
        if (attention_mask is None or plan is not None) and encoder_hidden_states is None and past_key_values is None:
            rows = on_demand(self, hidden_states, plan, shape, None)
            if rows is not None:
                return rows
        args = hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values
        out: Tensor
        if plan is None or not plan.across:
            out = super().forward(*args, **kwargs)
            return out
        with rows_numbered(plan.packed.indices):
            out = super().forward(*args, **kwargs)
        return leaving(self, out, plan)

    @property
    def causal(self) -> bool:
        return bool(self.attention.self.is_causal)

    def why_not_packed(self, inputs: Mapping[str, Any]) -> str | None:
        """Why hidden states (1, T, E) would not do for this layer."""
        if self.chunk_size_feed_forward:
            return "chunk_size_feed_forward"
        config = self.attention.self.config
        given = inputs.get("use_cache")
        if config.is_decoder and (config.use_cache if given is None else given):
            return "a cache is filled (use_cache)"
        return None

    def why_not_trimmed(self) -> str | None:
        """Why this layer's rows cannot be computed apart from each other."""
        attention = self.attention
        for module, suffix in ((attention, "Attention"), (attention.self, "SelfAttention")):
            cls = type(module)
            if not cls.__name__.endswith(suffix) or not cls.__module__.startswith("transformers.models."):
                return f"{cls.__name__} is not stock's"
        if attention.self.config._attn_implementation not in NAMES.values():
            return "attention is stock's"
        if self.chunk_size_feed_forward:
            return "chunk_size_feed_forward"
        fused = [m.dropout for m in (attention.output, self.output) if isinstance(m, DenseDropoutAddNorm) and m.plain()]
        return other_dropout(self, (attention.self.dropout, *fused))

    def prepare(self, hidden: Tensor, packed: PackedBatch, causal: bool, cache: Any) -> LayerRows:
        """What all rows contribute, hidden (T, E): keys and values."""
        attend = self.attention.self
        heads = (-1, attend.attention_head_size)
        return LayerRows(causal, attend.key(hidden).unflatten(-1, heads), attend.value(hidden).unflatten(-1, heads))

    def rows_of(self, chosen: Chosen, rows: Tensor, prepared: LayerRows) -> Tensor:
        """The layer's output (R, E) for the chosen rows, `rows` (R, E) of its input."""
        attend = self.attention.self
        attended = chosen.attend(
            attend.query(rows).unflatten(-1, (-1, attend.attention_head_size)),
            prepared.key,
            prepared.value,
            causal=prepared.causal,
            scale=attend.scaling,
            dropout_p=dropout_probability(attend.dropout),
            backend=self._fasttune.backend,
        )
        out: Tensor = self.feed_forward_chunk(self.attention.output(attended, rows))
        return out


class DenseGelu(Patched):
    """GELU(dense(x)), the bias added in the activation's pass."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        patch, dense, kind = self._fasttune, self.dense, gelu_kind(self.intermediate_act_fn)
        why = why_not_plain(dense, nn.Linear) or ("hooks on the activation" if not kind else None)
        if why is not None or dense.bias is None or not patch.fused(hidden_states):
            if why is not None:
                patch.aside(why)
            return super().forward(hidden_states)
        product = F.linear(hidden_states, dense.weight)
        return ops.bias_gelu(product, dense.bias, approximate=kind, backend=patch.backend)


class DenseGeluNorm(Patched):
    """LayerNorm(GELU(dense(x))): the transform of a masked-language-model head."""

    activation_name = "transform_act_fn"

    def forward(self, hidden_states: Tensor) -> Tensor:
        return few_rows(self, hidden_states, type(self).transformed, self.LayerNorm)

    def transformed(self, hidden_states: Tensor) -> Tensor:
        patch, norm = self._fasttune, self.LayerNorm
        kind = gelu_kind(getattr(self, self.activation_name))
        why = why_not_plain(norm, *LAYER_NORMS) or ("hooks on the activation" if not kind else None)
        if why is not None or not patch.fused(hidden_states):
            if why is not None:
                patch.aside(why)
            return super().forward(hidden_states)
        return gelu_then_norm(self.dense(hidden_states), norm, kind, patch.backend)


def few_rows(
    module: Patched, hidden_states: Tensor, function: Callable[[Any, Tensor], Tensor], norm: nn.LayerNorm
) -> Tensor:
    """function(module, hidden_states), ended by norm; in training as rows on demand: a loss reads the labelled ones.
    With trim=False of all rows at once, unless they are on demand already."""
    if torch.compiler.is_compiling():
        return function(module, hidden_states)
    watched = why_hooked(module) is not None  # somebody looks inside: stock shows all rows there
    if isinstance(hidden_states, LazyRows) and not hidden_states.computed() and not watched:
        return mapped(hidden_states, module, function, norm.weight.shape[0])
    if isinstance(hidden_states, LazyRows):
        hidden_states = hidden_states.materialize()
    if watched or not module._fasttune.selects_rows or not may_defer(module) or type(norm.weight) is not nn.Parameter:
        return function(module, hidden_states)
    rows = LazyRows.of(TensorRows(hidden_states), hidden_states.shape[:-1])
    return mapped(rows, module, function, norm.weight.shape[0])


def gelu_then_norm(x: Tensor, norm: nn.LayerNorm, kind: str, backend: str | None) -> Tensor:
    return ops.gelu_layer_norm(x, norm.weight, norm.bias, eps=norm.eps, approximate=kind, backend=backend)


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
        why = (
            ("inputs_embeds" if input_ids is None else None)
            or why_not_plain(word, *EMBEDDINGS)
            or why_not_plain(position, *EMBEDDINGS)
            or why_not_plain(token_type, *EMBEDDINGS)
            or why_not_plain(norm, *LAYER_NORMS)
            or why_not_plain(self.dropout, *DROPOUTS)
        )
        if why is not None or not patch.fused(word.weight):
            if why is not None:
                patch.aside(why)
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length)
        assert input_ids is not None
        if position_ids is None:
            position_ids = self.positions(input_ids, past_key_values_length)
        if token_type_ids is None:
            token_type_ids = self.token_type_ids.expand(position_ids.shape[0], -1).gather(1, position_ids)
        tied = lookup_view(word)
        return ops.embedding(
            input_ids,
            word.weight if tied is None else tied,
            position_ids=position_ids.expand(input_ids.shape),
            position_weight=without_gradient_of_row(position.weight, position.padding_idx),
            token_type_ids=token_type_ids.expand(input_ids.shape),
            token_type_weight=without_gradient_of_row(token_type.weight, token_type.padding_idx),
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            dropout_p=dropout_probability(self.dropout),
            padding_idx=word.padding_idx,
            sparse_grad=tied is not None,
            backend=patch.backend,
        )


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
    heads: Mapping[str, RowReader],
    vocabulary: str,
    transform: str,
    transform_covers: tuple[str, ...] = ("LayerNorm", "transform_act_fn"),
    transform_unsuited: Callable[[Any], str | None] = lambda module: None,
) -> Family:
    """The family of a BERT-like model.

    stock: its module in Transformers. classes: the replacements by stock name, `<prefix>SelfOutput` and so on.
    heads: model class name -> which rows it reads. vocabulary: the attribute name of the projection to the vocabulary.
    transform: the class before it.
    """

    def replace(stock_name: str, group: str, operation: str, does: str, **more: Any) -> Replacement:
        return Replacement(getattr(stock, stock_name), classes[stock_name], group, operation, does, **more)

    norm_of_dense = {"covers": ("LayerNorm", "dropout")}
    return Family(
        name=name,
        heads={getattr(stock, head): reader for head, reader in heads.items()},
        replacements=(
            replace(
                f"{prefix}Embeddings",
                "embeddings",
                "embedding",
                "lookups + sum + LayerNorm + dropout",
                covers=("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm", "dropout"),
                unsuited=lambda module: (
                    why_no_layer_norm(module.LayerNorm)
                    or why_no_embedding(module.word_embeddings)
                    or why_no_embedding(module.position_embeddings)
                    or why_no_embedding(module.token_type_embeddings)
                ),
            ),
            *(
                replace(
                    f"{prefix}{part}",
                    "norms",
                    "dropout_add_layer_norm",
                    "dropout + residual + LayerNorm",
                    unsuited=lambda module: why_no_layer_norm(module.LayerNorm),
                    **norm_of_dense,
                )
                for part in ("SelfOutput", "Output")
            ),
            replace(
                f"{prefix}Intermediate",
                "mlp",
                "bias_gelu",
                "bias + GELU",
                covers=("intermediate_act_fn",),
                unsuited=why_no_gelu("intermediate_act_fn"),
            ),
            replace(
                transform,
                "mlp",
                "gelu_layer_norm",
                "GELU + LayerNorm",
                covers=transform_covers,
                unsuited=transform_unsuited,
                lazy=True,
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
        attentions=(getattr(stock, f"{prefix}SelfAttention"), getattr(stock, f"{prefix}CrossAttention")),
        layers=lambda model: model.base_model.encoder.layer,
    )
