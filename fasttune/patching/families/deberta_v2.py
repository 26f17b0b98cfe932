"""DeBERTa-v2 and v3: post-norm layers with disentangled attention. Tokens at padding weigh all columns alike there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deberta_v2 import modeling_deberta_v2 as stock

from fasttune import ops
from fasttune.ops._random import repeating
from fasttune.patching.families import _bert_like as shared
from fasttune.patching.families._leaves import bias_activation, common_leaves, dropout_add_norm, lookup, whole_layer
from fasttune.patching.families.spec import Family, Replacement
from fasttune.patching.layers.attention import layout_for_attention
from fasttune.patching.layers.captured import Parts
from fasttune.patching.layers.embeddings import Sum, sum_norm_dropout, why_no_sum
from fasttune.patching.layers.entry import EAGER, ordinary
from fasttune.patching.layers.frozen import Unknown, linear, probability
from fasttune.patching.layers.leaves import logits_on_demand, why_at_once
from fasttune.patching.layers.mlp import transform, why_no_gelu
from fasttune.patching.layers.patched import Patched
from fasttune.patching.layers.projections import Separate
from fasttune.patching.layers.promised import PromisedLayer
from fasttune.patching.layers.real_keys import over_all_columns
from fasttune.patching.layers.relative import ByDistance, Cut, Relative
from fasttune.patching.padding.layout import Layout
from fasttune.patching.premises.known import why_replaced, why_unknown
from fasttune.patching.promises.source import take_rows


def _sum(module: Any) -> Sum:
    positions = module.position_embeddings if module.position_biased_input else None
    return Sum(module.word_embeddings, module.LayerNorm, module.dropout, positions, module.token_type_embeddings)


def _why_no_sum(module: Any) -> str | None:
    return why_no_sum(_sum(module)) if module.embed_proj is None else "a projection between lookup and LayerNorm"


class DebertaV2Embeddings(Patched, stock.DebertaV2Embeddings):
    """Stock multiplies by the mask before dropout, which scales what it keeps whatever that is."""

    def forward(
        self,
        input_ids: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        mask: Any = None,
        inputs_embeds: Any = None,
    ) -> Any:
        def ids() -> tuple[Tensor | None, Tensor | None]:
            positions = self.position_ids[:, : input_ids.shape[1]] if position_ids is None else position_ids
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            parts = _sum(self)
            return None if parts.position is None else positions, None if parts.token_type is None else types

        out = None
        if inputs_embeds is None and self.embed_proj is None:
            out = sum_norm_dropout(self, _sum(self), input_ids, ids)
        if out is None:
            return super().forward(input_ids, token_type_ids, position_ids, mask, inputs_embeds)
        if mask is None:
            return out
        if mask.dim() != out.dim():
            mask = (mask.squeeze(1).squeeze(1) if mask.dim() == 4 else mask).unsqueeze(2)
        masked = out * mask.to(out.dtype)
        if hasattr(out, "_fasttune_tied"):
            masked._fasttune_tied = out._fasttune_tied
        return masked


_METHODS = ("transpose_for_scores", "disentangled_attention_bias")
_FUNCTIONS = (stock.build_rpos, stock.scaled_size_sqrt)  # others may replace them for the whole process


def _why_not_stocks(attention: Any) -> str | None:
    """Why what this module calls by name may not be what its class ships."""
    if any(name in attention.__dict__ for name in _METHODS):
        return "a method of DisentangledSelfAttention was replaced on the instance"
    if (stock.build_rpos, stock.scaled_size_sqrt) != _FUNCTIONS:
        return "build_rpos or scaled_size_sqrt was replaced for the whole process"
    return why_replaced(stock.DisentangledSelfAttention, *_METHODS)


def _terms(attention: Any) -> dict[str, bool]:
    return {term: term in attention.pos_att_type for term in ("c2p", "p2c")}


def _scale(attention: Any) -> float:
    terms = _terms(attention).values()
    return 1.0 / float(torch.tensor(attention.attention_head_size * (1.0 + sum(terms)), dtype=torch.float32).sqrt())


def _positions(attention: Any, relative_pos: Any, rel_embeddings: Any, length: int) -> ByDistance | bool:
    """False where scores go by something else than distances, True where they go by content alone."""
    if not attention.relative_attention or not any(_terms(attention).values()):
        return True
    found = ByDistance.of(relative_pos, rel_embeddings, length)
    return found if found is not None and found.table.shape[0] >= 2 * attention.pos_ebd_size else False


def _cut(attention: Any, positions: ByDistance, layout: Layout) -> Cut:
    return positions.distances.cut(layout.packed.max_seqlen, attention.pos_ebd_size, **_terms(attention))


def _projections(attention: Any) -> dict[str, Any]:
    """Of embeddings: the layers whose output queries and keys meet."""
    shared = attention.share_att_key
    names = ("key_proj", "query_proj") if shared else ("pos_key_proj", "pos_query_proj")
    return {n: getattr(attention, name) for n, name in zip(("c2p", "p2c"), names, strict=True) if _terms(attention)[n]}


def _relative(attention: Any, positions: ByDistance, layout: Layout, backend: str | None) -> Relative:
    """Captured: the embeddings are projected at once, for every row of the layer meets them."""
    cut = _cut(attention, positions, layout)
    rows, numbers = _embeddings(attention, positions, cut, backend)
    heads = (-1, attention.attention_head_size)
    tables = {n: linear(part)(rows, numbers).unflatten(-1, heads) for n, part in _projections(attention).items()}
    return Relative(tables.get("c2p"), tables.get("p2c"), cut.buckets)


def _embeddings(attention: Any, positions: ByDistance, cut: Cut, backend: str | None) -> tuple[Tensor, Tensor]:
    """Those that are used (W, E), after dropout, and their numbers (W,); raises Unknown."""
    numbers = torch.arange(cut.begin, cut.end, device=positions.table.device)
    p = probability(attention.pos_dropout)
    rows = positions.table[cut.begin : cut.end]
    return ops.dropout(rows, dropout_p=p, row_ids=numbers, backend=backend), numbers


class DebertaV2Layer(PromisedLayer, stock.DebertaV2Layer):
    both_real = True

    def attends(self) -> Any:
        attention = getattr(self.attention, "self", None)
        return attention if isinstance(attention, stock.DisentangledSelfAttention) else None

    def described(self, attention: Any) -> Any:
        return EAGER

    def parts(self, positions: Any = None) -> Parts:
        attention, attend = self.attention, self.attention.self
        why = _why_not_stocks(attend)
        if why is not None:
            raise Unknown(why)
        backend = self._fasttune.backend
        return Parts(
            inside=(
                (attention, stock.DebertaV2Attention),
                (attend, stock.DisentangledSelfAttention),
                (attention.output, stock.DebertaV2SelfOutput),
                (self.intermediate, stock.DebertaV2Intermediate),
                (self.output, stock.DebertaV2Output),
            ),
            attend=attend,
            project=Separate(attend.query_proj, attend.key_proj, attend.value_proj, attend.attention_head_size),
            scale=_scale(attend),
            relative=None if positions is None else lambda layout: _relative(attend, positions, layout, backend),
            attention_dropout=attend.dropout,
            calls_dropout=True,
            out=attention.output.dense,
            out_dropout=attention.output.dropout,
            norm1=attention.output.LayerNorm,
            up=self.intermediate.dense,
            act=self.intermediate.intermediate_act_fn,
            down=self.output.dense,
            down_dropout=self.output.dropout,
            norm2=self.output.LayerNorm,
        )

    def forward(
        self,
        hidden_states: Any,
        attention_mask: Any,
        query_states: Any = None,
        relative_pos: Any = None,
        rel_embeddings: Any = None,
        output_attentions: bool = False,
    ) -> Any:
        attention, out = self.attends(), None
        if attention is not None and isinstance(attention_mask, Tensor) and hidden_states.dim() == 3:
            positions = _positions(attention, relative_pos, rel_embeddings, hidden_states.shape[1])
            others = {
                "query_states": query_states,
                "output_attentions": output_attentions,
                "relative_pos": not positions,
            }
            by_distance = positions if isinstance(positions, ByDistance) else None
            out, _ = self.promised(hidden_states, attention_mask, others, by_distance)
        if out is not None:
            return out, None
        hidden_states, attention_mask, query_states = ordinary(hidden_states, attention_mask, query_states)
        return super().forward(
            hidden_states, attention_mask, query_states, relative_pos, rel_embeddings, output_attentions
        )


class DisentangledSelfAttention(Patched, stock.DisentangledSelfAttention):
    """Self-attention without a T×T tensor, in layers that run as they stand."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any,
        output_attentions: bool = False,
        query_states: Any = None,
        relative_pos: Any = None,
        rel_embeddings: Any = None,
    ) -> Any:
        others = {"query_states": query_states, "output_attentions": output_attentions}
        out = None
        if isinstance(attention_mask, Tensor) and hidden_states.dim() == 3 and 0 not in hidden_states.shape:
            out = self._without_scores(hidden_states, attention_mask, relative_pos, rel_embeddings, others)
        if out is not None:
            return out, None
        return super().forward(
            hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
        )

    def _without_scores(
        self, hidden: Tensor, mask: Tensor, relative_pos: Any, rel_embeddings: Any, arguments: dict[str, Any]
    ) -> Tensor | None:
        if torch.compiler.is_compiling():  # which looks at no mask
            return None
        why = why_unknown(self.dropout, nn.Dropout) or _why_not_stocks(self)
        for part in _projections(self).values():  # which are given a part of the table
            why = why or why_unknown(part, nn.Linear)
        if why is not None:
            self._fasttune.aside(why)
            return None
        positions = _positions(self, relative_pos, rel_embeddings, hidden.shape[1])
        by_distance = positions if isinstance(positions, ByDistance) else None
        layout = layout_for_attention(
            self,
            hidden,
            mask,
            self.attention_head_size,
            {**arguments, "relative_pos": not positions},
            described=EAGER,
            by_distance=by_distance is not None,
            both_real=True,
        )
        if layout is None:
            return None
        relative = None
        if by_distance is not None:
            try:
                cut = _cut(self, by_distance, layout)
                rows, _ = _embeddings(self, by_distance, cut, self._fasttune.backend)
            except Unknown as unknown:
                self._fasttune.aside(str(unknown))
                return None
            heads = (-1, self.attention_head_size)
            tables = {n: part(rows).unflatten(-1, heads) for n, part in _projections(self).items()}
            relative = Relative(tables.get("c2p"), tables.get("p2c"), cut.buckets)
        return self._attended(hidden, layout, relative)

    def _attended(self, hidden: Tensor, layout: Layout, relative: Relative | None) -> Tensor:
        query, key, value = (
            project(hidden).flatten(0, 1).unflatten(-1, (-1, self.attention_head_size))
            for project in (self.query_proj, self.key_proj, self.value_proj)
        )
        whole = value
        if not layout.full:
            query, key, value = (take_rows(x, layout.real_ids) for x in (query, key, value))
        options: dict[str, Any] = {
            "scale": _scale(self),
            "dropout_p": self.dropout.p if self.dropout.training else 0.0,
            "cu_seqlens": layout.packed.cu_seqlens,
            "max_seqlen": layout.packed.max_seqlen,
            "backend": self._fasttune.backend,
        }
        terms = {} if relative is None else relative(query, key)
        seed: list[Tensor] = []  # one for both, as where rows are read late
        with repeating(seed):
            out = ops.attention(query, key, value, **options, **terms)
        if not layout.full:
            padding = (layout.places < 0).nonzero().squeeze(1)
            with repeating(seed):
                blind = over_all_columns(padding, value, take_rows(whole, padding), layout, options)
            order = layout.places.clone()
            order[padding] = layout.total + torch.arange(padding.numel())
            out = take_rows(torch.cat((out, blind)), order)
        return out.unflatten(0, layout.shape).flatten(2)


class DebertaV2SelfOutput(shared.DenseDropoutAddNorm, stock.DebertaV2SelfOutput):
    pass


class DebertaV2Intermediate(shared.DenseActivation, stock.DebertaV2Intermediate):
    pass


class DebertaV2Output(shared.DenseDropoutAddNorm, stock.DebertaV2Output):
    pass


class LegacyDebertaV2PredictionHeadTransform(shared.DenseGeluNorm, stock.LegacyDebertaV2PredictionHeadTransform):
    pass


class DebertaV2LMPredictionHead(Patched, stock.DebertaV2LMPredictionHead):
    """Multiplies by the weight of the embeddings, which it is handed."""

    def forward(self, hidden_states: Any, word_embeddings: Any) -> Any:
        transformed = transform(self, hidden_states, self.dense, self.transform_act_fn, self.LayerNorm)
        if transformed is None:
            return super().forward(hidden_states, word_embeddings)
        weight, patch = word_embeddings.weight, self._fasttune
        why = why_at_once(self, transformed, weight) if patch.settings.options.loss else ""
        if why is None:
            return logits_on_demand(self, transformed, weight, self.bias)
        if why:
            patch.aside(why)
        return torch.matmul(transformed, weight.t()) + self.bias


_OF_EVERY_TOKEN = (
    stock.DebertaV2ForMaskedLM,
    stock.DebertaV2ForTokenClassification,
    stock.DebertaV2ForQuestionAnswering,
)


def _transform(by: type[nn.Module], of: type[nn.Module]) -> Replacement:
    return Replacement(
        of,
        by,
        "mlp",
        "gelu_layer_norm",
        "GELU + LayerNorm",
        covers=("LayerNorm", "transform_act_fn"),
        unsuited=why_no_gelu("transform_act_fn"),
    )


FAMILY = Family(
    name="deberta_v2",
    heads=(
        stock.DebertaV2Model,
        stock.DebertaV2ForSequenceClassification,
        stock.DebertaV2ForMultipleChoice,
        *_OF_EVERY_TOKEN,
    ),
    of_every_token=_OF_EVERY_TOKEN,
    replacements=(
        Replacement(
            stock.DebertaV2Embeddings,
            DebertaV2Embeddings,
            "embeddings",
            "embedding",
            "lookups + sum + LayerNorm + dropout",
            covers=("position_embeddings", "token_type_embeddings", "LayerNorm", "dropout"),
            unsuited=_why_no_sum,
        ),
        lookup("word_embeddings"),
        Replacement(
            stock.DisentangledSelfAttention,
            DisentangledSelfAttention,
            "attention",
            "attention",
            "attention without a T×T tensor",
            covers=("dropout", "pos_dropout"),
        ),
        dropout_add_norm(stock.DebertaV2SelfOutput, DebertaV2SelfOutput),
        dropout_add_norm(stock.DebertaV2Output, DebertaV2Output),
        bias_activation(stock.DebertaV2Intermediate, DebertaV2Intermediate, "intermediate_act_fn"),
        _transform(LegacyDebertaV2PredictionHeadTransform, stock.LegacyDebertaV2PredictionHeadTransform),
        _transform(DebertaV2LMPredictionHead, stock.DebertaV2LMPredictionHead),
        whole_layer(stock.DebertaV2Layer, DebertaV2Layer),
        *common_leaves("decoder"),
    ),
)
