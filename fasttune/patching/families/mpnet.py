"""MPNet: post-norm layers that share one bias of the scores by distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mpnet import modeling_mpnet as stock

from fasttune.patching.families import _bert_like as shared
from fasttune.patching.families import _roberta_like
from fasttune.patching.families._leaves import bias_activation, common_leaves, dropout_add_norm, lookup, whole_layer
from fasttune.patching.families.spec import Family, Replacement
from fasttune.patching.layers.attention import attend, layout_for_attention
from fasttune.patching.layers.captured import Parts
from fasttune.patching.layers.embeddings import Sum, sum_norm_dropout, why_no_sum
from fasttune.patching.layers.entry import EAGER, ordinary
from fasttune.patching.layers.leaves import why_no_layer_norm
from fasttune.patching.layers.patched import Patched
from fasttune.patching.layers.projections import Separate
from fasttune.patching.layers.promised import PromisedLayer
from fasttune.patching.marks import unusual
from fasttune.patching.premises.known import why_replaced, why_unknown
from fasttune.patching.promises.distances import DistanceBias


def _sum(module: Any) -> Sum:
    return Sum(module.word_embeddings, module.LayerNorm, module.dropout, module.position_embeddings)


class MPNetEmbeddings(Patched, stock.MPNetEmbeddings):
    def forward(self, input_ids: Any = None, position_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        def ids() -> tuple[Tensor, None]:
            if position_ids is not None:
                return position_ids, None
            return stock.create_position_ids_from_input_ids(input_ids, self.padding_idx), None

        out = None if inputs_embeds is not None else sum_norm_dropout(self, _sum(self), input_ids, ids)
        return super().forward(input_ids, position_ids, inputs_embeds, **kwargs) if out is None else out


_BIAS = ("compute_position_bias", "relative_position_bucket")


class MPNetEncoder(Patched, stock.MPNetEncoder):
    """Hands its layers the bias as a table by distance; who reads it gets stock's (B, H, S, S)."""

    def compute_position_bias(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        table = self.relative_attention_bias
        why = why_unknown(table, nn.Embedding) or why_replaced(stock.MPNetEncoder, *_BIAS)
        if why is not None:
            self._fasttune.aside(why)
        if why is not None or others or named or torch.compiler.is_compiling() or unusual():
            whole: Tensor = super().compute_position_bias(x, *others, **named)
            return whole
        self._fasttune.note()
        distances = torch.arange(1 - x.shape[1], x.shape[1], device=x.device)
        return DistanceBias.by(table(self.relative_position_bucket(distances)).t(), x.shape[0])


def _table(position_bias: Any) -> DistanceBias | None:
    return position_bias if isinstance(position_bias, DistanceBias) and position_bias.as_table else None


class MPNetLayer(PromisedLayer, stock.MPNetLayer):
    def attends(self) -> Any:
        attention = getattr(self.attention, "attn", None)
        return attention if isinstance(attention, stock.MPNetSelfAttention) else None

    def described(self, attention: Any) -> Any:
        return EAGER

    def parts(self, positions: Any = None) -> Parts:
        attention, attn = self.attention, self.attention.attn
        return Parts(
            inside=(
                (attention, stock.MPNetAttention),
                (attn, stock.MPNetSelfAttention),
                (self.intermediate, stock.MPNetIntermediate),
                (self.output, stock.MPNetOutput),
            ),
            attend=attn,
            project=Separate(attn.q, attn.k, attn.v, attn.attention_head_size),
            scale=attn.attention_head_size**-0.5,
            bias=None if positions is None else positions.table,
            attention_dropout=attn.dropout,
            calls_dropout=True,
            out=attn.o,
            out_dropout=attention.dropout,
            norm1=attention.LayerNorm,
            up=self.intermediate.dense,
            act=self.intermediate.intermediate_act_fn,
            down=self.output.dense,
            down_dropout=self.output.dropout,
            norm2=self.output.LayerNorm,
        )

    def forward(
        self,
        hidden_states: Any,
        attention_mask: Any = None,
        position_bias: Any = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        table = _table(position_bias)
        others = {"output_attentions": output_attentions, **kwargs}
        if table is None:
            others["position_bias"] = position_bias
        out, attention_mask = self.promised(hidden_states, attention_mask, others, table)
        if out is not None:
            return (out,)
        hidden_states, attention_mask = ordinary(hidden_states, attention_mask)
        return super().forward(hidden_states, attention_mask, position_bias, output_attentions, **kwargs)


class MPNetSelfAttention(Patched, stock.MPNetSelfAttention):
    """Self-attention without a T×T tensor, in layers that run as they stand."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_bias: Any = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        table, layout = _table(position_bias), None
        why = why_unknown(self.dropout, nn.Dropout)
        if why is not None:
            self._fasttune.aside(why)
        elif hidden_states.dim() == 3 and 0 not in hidden_states.shape and (position_bias is None or table is not None):
            layout = layout_for_attention(
                self,
                hidden_states,
                attention_mask,
                self.attention_head_size,
                {"output_attentions": output_attentions, **kwargs},
                described=EAGER,
                by_distance=table is not None,
            )
        if layout is None:
            return super().forward(hidden_states, attention_mask, position_bias, output_attentions, **kwargs)
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.attention_head_size)) for project in (self.q, self.k, self.v)
        )
        out = attend(
            query,
            key,
            value,
            layout,
            scale=self.attention_head_size**-0.5,
            bias=None if table is None else table.table,
            dropout_p=self.dropout.p if self.dropout.training else 0.0,
            backend=self._fasttune.backend,
        )
        return (self.o(out.flatten(2)),)


class MPNetAttention(shared.DropoutAddNorm, stock.MPNetAttention):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_bias: Any = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        if not self.in_one(hidden_states):
            return super().forward(hidden_states, attention_mask, position_bias, output_attentions, **kwargs)
        outputs = self.attn(hidden_states, attention_mask, position_bias, output_attentions=output_attentions)
        return (self.normed(outputs[0], hidden_states), *outputs[1:])


class MPNetIntermediate(shared.DenseActivation, stock.MPNetIntermediate):
    pass


class MPNetOutput(shared.DenseDropoutAddNorm, stock.MPNetOutput):
    pass


class MPNetLMHead(_roberta_like.LMHead, stock.MPNetLMHead):
    pass


_OF_EVERY_TOKEN = (stock.MPNetForMaskedLM, stock.MPNetForTokenClassification, stock.MPNetForQuestionAnswering)


FAMILY = Family(
    name="mpnet",
    heads=(
        stock.MPNetModel,
        stock.MPNetForSequenceClassification,
        stock.MPNetForMultipleChoice,
        *_OF_EVERY_TOKEN,
    ),
    of_every_token=_OF_EVERY_TOKEN,
    replacements=(
        Replacement(
            stock.MPNetEmbeddings,
            MPNetEmbeddings,
            "embeddings",
            "embedding",
            "lookups + sum + LayerNorm + dropout",
            covers=("position_embeddings", "LayerNorm", "dropout"),
            unsuited=lambda module: why_no_sum(_sum(module)),
        ),
        lookup("word_embeddings"),
        Replacement(
            stock.MPNetEncoder,
            MPNetEncoder,
            "attention",
            "attention",
            "one bias by distance for all layers",
        ),
        Replacement(
            stock.MPNetSelfAttention,
            MPNetSelfAttention,
            "attention",
            "attention",
            "attention without a T×T tensor",
            covers=("dropout",),
        ),
        dropout_add_norm(stock.MPNetAttention, MPNetAttention),
        dropout_add_norm(stock.MPNetOutput, MPNetOutput),
        bias_activation(stock.MPNetIntermediate, MPNetIntermediate, "intermediate_act_fn"),
        Replacement(
            stock.MPNetLMHead,
            MPNetLMHead,
            "mlp",
            "gelu_layer_norm",
            "GELU + LayerNorm",
            covers=("layer_norm",),
            unsuited=lambda module: why_no_layer_norm(module.layer_norm),
        ),
        whole_layer(stock.MPNetLayer, MPNetLayer),
        *common_leaves("decoder"),
    ),
)
