"""DistilBERT: BERT without token types, and without dropout behind attention's output projection."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.distilbert import modeling_distilbert as stock

from fasttune.patching.families._leaves import bias_activation, common_leaves, lookup, whole_layer
from fasttune.patching.families.spec import Family, Replacement
from fasttune.patching.layers.attention import self_attention
from fasttune.patching.layers.captured import Parts
from fasttune.patching.layers.embeddings import Sum, sum_norm_dropout, why_no_sum
from fasttune.patching.layers.mlp import dense_activation
from fasttune.patching.layers.patched import Patched
from fasttune.patching.layers.projections import Separate
from fasttune.patching.layers.promised import PromisedEncoderLayer


def _sum(module: Any) -> Sum:
    return Sum(module.word_embeddings, module.LayerNorm, module.dropout, module.position_embeddings)


class Embeddings(Patched, stock.Embeddings):
    def forward(self, input_ids: Tensor, inputs_embeds: Tensor | None = None, position_ids: Any = None) -> Tensor:
        def ids() -> tuple[Tensor, None]:
            return self.position_ids[:, : input_ids.shape[1]] if position_ids is None else position_ids, None

        out = sum_norm_dropout(self, _sum(self), input_ids, ids)
        return super().forward(input_ids, inputs_embeds, position_ids) if out is None else out


class TransformerBlock(PromisedEncoderLayer, stock.TransformerBlock):
    def attends(self) -> Any:
        return self.attention if isinstance(self.attention, stock.DistilBertSelfAttention) else None

    def heads(self, attention: Any) -> tuple[int, int]:
        return attention.n_heads, attention.attention_head_size

    def parts(self, positions: Any = None) -> Parts:
        attend, ffn = self.attention, self.ffn
        return Parts(
            inside=((attend, stock.DistilBertSelfAttention), (ffn, stock.FFN)),
            attend=attend,
            project=Separate(attend.q_lin, attend.k_lin, attend.v_lin, attend.attention_head_size),
            scale=attend.scaling,
            attention_dropout=attend.dropout,
            out=attend.out_lin,
            out_dropout=None,
            norm1=self.sa_layer_norm,
            up=ffn.lin1,
            act=ffn.activation,
            down=ffn.lin2,
            down_dropout=ffn.dropout,
            norm2=self.output_layer_norm,
            chunks=ffn.chunk_size_feed_forward,
        )


class DistilBertSelfAttention(Patched, stock.DistilBertSelfAttention):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        projections = (self.q_lin, self.k_lin, self.v_lin)
        out = self_attention(self, hidden_states, attention_mask, projections, dropout=self.dropout, arguments=kwargs)
        return super().forward(hidden_states, attention_mask, **kwargs) if out is None else (self.out_lin(out), None)


class FFN(Patched, stock.FFN):
    def forward(self, input: Tensor) -> Tensor:
        middle = None
        if not self.chunk_size_feed_forward and "ff_chunk" not in self.__dict__:
            middle = dense_activation(self, input, self.lin1, self.activation)
        return super().forward(input) if middle is None else self.dropout(self.lin2(middle))


_OF_EVERY_TOKEN = (
    stock.DistilBertForMaskedLM,
    stock.DistilBertForTokenClassification,
    stock.DistilBertForQuestionAnswering,
)

FAMILY = Family(
    name="distilbert",
    heads=(
        stock.DistilBertModel,
        stock.DistilBertForSequenceClassification,
        stock.DistilBertForMultipleChoice,
        *_OF_EVERY_TOKEN,
    ),
    of_every_token=_OF_EVERY_TOKEN,
    replacements=(
        Replacement(
            stock.Embeddings,
            Embeddings,
            "embeddings",
            "embedding",
            "lookups + sum + LayerNorm + dropout",
            covers=("position_embeddings", "LayerNorm", "dropout"),
            unsuited=lambda module: why_no_sum(_sum(module)),
        ),
        lookup("word_embeddings"),
        Replacement(
            stock.DistilBertSelfAttention,
            DistilBertSelfAttention,
            "attention",
            "attention",
            "attention without a T×T tensor",
            covers=("dropout",),
        ),
        bias_activation(stock.FFN, FFN, "activation"),
        whole_layer(stock.TransformerBlock, TransformerBlock),
        *common_leaves("vocab_projector"),
    ),
)
