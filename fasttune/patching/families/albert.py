"""ALBERT: BERT's layer under other names, one set of weights for many layers, embeddings narrower than the layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.albert import modeling_albert as stock

from fasttune.patching.families import _bert_like as shared
from fasttune.patching.families._leaves import common_leaves, lookup, whole_layer
from fasttune.patching.families.spec import Family, Replacement
from fasttune.patching.layers.attention import self_attention
from fasttune.patching.layers.captured import Parts
from fasttune.patching.layers.embeddings import why_no_sum
from fasttune.patching.layers.leaves import why_no_layer_norm
from fasttune.patching.layers.mlp import transform
from fasttune.patching.layers.patched import Patched
from fasttune.patching.layers.projections import Separate
from fasttune.patching.layers.promised import PromisedEncoderLayer


class AlbertEmbeddings(shared.LookedUp, stock.AlbertEmbeddings):
    def forward(
        self, input_ids: Any = None, token_type_ids: Any = None, position_ids: Any = None, inputs_embeds: Any = None
    ) -> Tensor:
        out = self.looked_up(input_ids, token_type_ids, position_ids)
        if out is None:
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds)
        return out


class AlbertLayer(PromisedEncoderLayer, stock.AlbertLayer):
    def attends(self) -> Any:
        return self.attention if isinstance(self.attention, stock.AlbertAttention) else None

    def parts(self, positions: Any = None) -> Parts:
        attend = self.attention
        return Parts(
            inside=((attend, stock.AlbertAttention),),
            attend=attend,
            project=Separate(attend.query, attend.key, attend.value, attend.attention_head_size),
            scale=attend.scaling,
            attention_dropout=attend.attention_dropout,
            out=attend.dense,
            out_dropout=attend.output_dropout,
            norm1=attend.LayerNorm,
            up=self.ffn,
            act=self.activation,
            down=self.ffn_output,
            down_dropout=None,
            norm2=self.full_layer_layer_norm,
            chunks=self.chunk_size_feed_forward,
        )


class AlbertAttention(Patched, stock.AlbertAttention):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        out = self_attention(
            self,
            hidden_states,
            attention_mask,
            (self.query, self.key, self.value),
            dropout=self.attention_dropout,
            arguments=kwargs,
        )
        if out is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        return self.LayerNorm(hidden_states + self.output_dropout(self.dense(out))), None


class AlbertMLMHead(Patched, stock.AlbertMLMHead):
    def forward(self, hidden_states: Tensor) -> Tensor:
        transformed = transform(self, hidden_states, self.dense, self.activation, self.LayerNorm)
        return super().forward(hidden_states) if transformed is None else self.decoder(transformed)


_OF_EVERY_TOKEN = (
    stock.AlbertForMaskedLM,
    stock.AlbertForPreTraining,
    stock.AlbertForTokenClassification,
    stock.AlbertForQuestionAnswering,
)

FAMILY = Family(
    name="albert",
    heads=(
        stock.AlbertModel,
        stock.AlbertForSequenceClassification,
        stock.AlbertForMultipleChoice,
        *_OF_EVERY_TOKEN,
    ),
    of_every_token=_OF_EVERY_TOKEN,
    replacements=(
        Replacement(
            stock.AlbertEmbeddings,
            AlbertEmbeddings,
            "embeddings",
            "embedding",
            "lookups + sum + LayerNorm + dropout",
            covers=("position_embeddings", "token_type_embeddings", "LayerNorm", "dropout"),
            unsuited=lambda module: why_no_sum(shared.sum_of(module)),
        ),
        lookup("word_embeddings"),
        Replacement(
            stock.AlbertAttention,
            AlbertAttention,
            "attention",
            "attention",
            "attention without a T×T tensor",
            covers=("attention_dropout",),
        ),
        Replacement(
            stock.AlbertMLMHead,
            AlbertMLMHead,
            "mlp",
            "gelu_layer_norm",
            "GELU + LayerNorm",
            covers=("LayerNorm",),
            unsuited=lambda module: why_no_layer_norm(module.LayerNorm),
        ),
        whole_layer(stock.AlbertLayer, AlbertLayer),
        *common_leaves("decoder"),
    ),
)
