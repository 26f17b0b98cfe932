"""ModernBERT: pre-norm layers with rotary positions, two of three with a sliding window, gated MLPs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.modernbert import modeling_modernbert as stock

from fasttune.patching.families._leaves import common_leaves, lookup
from fasttune.patching.families.spec import Family, Replacement
from fasttune.patching.layers.attention import attend, layout_for_attention
from fasttune.patching.layers.captured import Parts
from fasttune.patching.layers.embeddings import Sum, sum_norm_dropout, why_no_sum
from fasttune.patching.layers.entry import ordinary
from fasttune.patching.layers.frozen import Unknown
from fasttune.patching.layers.leaves import why_no_layer_norm
from fasttune.patching.layers.mlp import gated_activation, transform, why_no_activation, why_no_gelu
from fasttune.patching.layers.patched import Patched
from fasttune.patching.layers.pre_norm import PreNorm
from fasttune.patching.layers.projections import Fused, Rotary
from fasttune.patching.layers.promised import PromisedLayer

_TURN = stock.apply_rotary_pos_emb  # others replace it for the whole process


def _sum(module: Any) -> Sum:
    return Sum(module.tok_embeddings, module.norm, module.drop)


class ModernBertEmbeddings(Patched, stock.ModernBertEmbeddings):
    def forward(self, input_ids: Any = None, inputs_embeds: Tensor | None = None) -> Tensor:
        out = None if inputs_embeds is not None else sum_norm_dropout(self, _sum(self), input_ids)
        return super().forward(input_ids, inputs_embeds) if out is None else out


class ModernBertEncoderLayer(PromisedLayer, stock.ModernBertEncoderLayer):
    captured = PreNorm

    def attends(self) -> Any:
        return self.attn if isinstance(self.attn, stock.ModernBertAttention) else None

    def heads(self, attention: Any) -> tuple[int, int]:
        return attention.config.num_attention_heads, attention.head_dim

    def window(self) -> int | None:
        return _window(self.attn)

    def parts(self, position_embeddings: Any = None) -> Parts:
        if stock.apply_rotary_pos_emb is not _TURN:
            raise Unknown("apply_rotary_pos_emb was replaced for the whole process")
        attn, mlp = self.attn, self.mlp
        heads, head_dim = self.heads(attn)
        return Parts(
            inside=((attn, stock.ModernBertAttention), (mlp, stock.ModernBertMLP)),
            attend=attn,
            project=Fused(attn.Wqkv, heads, head_dim, Rotary(*position_embeddings)),
            scale=head_dim**-0.5,
            attention_dropout=attn.attention_dropout,
            out=attn.Wo,
            out_dropout=attn.out_drop,
            norm1=self.attn_norm,
            up=mlp.Wi,
            act=mlp.act,
            gated=True,
            gate_dropout=mlp.drop,
            down=mlp.Wo,
            down_dropout=None,
            norm2=self.mlp_norm,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        out, attention_mask = self.promised(hidden_states, attention_mask, kwargs, position_embeddings)
        if out is None:
            hidden_states, attention_mask = ordinary(hidden_states, attention_mask)
            out = super().forward(hidden_states, attention_mask, position_embeddings, **kwargs)
        return out


def _window(attention: Any) -> int | None:
    """Stock counts a token itself in."""
    return None if attention.sliding_window is None else attention.sliding_window - 1


class ModernBertAttention(Patched, stock.ModernBertAttention):
    """Self-attention without a T×T tensor, in layers that run as they stand."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        layout, backend = None, self._fasttune.backend
        if hidden_states.dim() == 3 and 0 not in hidden_states.shape and stock.apply_rotary_pos_emb is _TURN:
            layout = layout_for_attention(
                self, hidden_states, attention_mask, self.head_dim, kwargs, window=_window(self)
            )
        if layout is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        qkv = self.Wqkv(hidden_states).unflatten(-1, (3, -1, self.head_dim))
        query, key, value = Rotary(*position_embeddings).of_batch(qkv, 2, backend).unbind(-3)
        p = self.attention_dropout if self.training else 0.0
        out = attend(query, key, value, layout, scale=self.head_dim**-0.5, dropout_p=p, backend=backend)
        return self.out_drop(self.Wo(out.flatten(2))), None


class ModernBertMLP(Patched, stock.ModernBertMLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        middle = gated_activation(self, hidden_states, self.Wi, self.act)
        return super().forward(hidden_states) if middle is None else self.Wo(self.drop(middle))


class ModernBertPredictionHead(Patched, stock.ModernBertPredictionHead):
    def forward(self, hidden_states: Tensor) -> Tensor:
        transformed = transform(self, hidden_states, self.dense, self.act, self.norm)
        return super().forward(hidden_states) if transformed is None else transformed


_OF_EVERY_TOKEN = (
    stock.ModernBertForMaskedLM,
    stock.ModernBertForTokenClassification,
    stock.ModernBertForQuestionAnswering,
)

FAMILY = Family(
    name="modernbert",
    heads=(
        stock.ModernBertModel,
        stock.ModernBertForSequenceClassification,
        stock.ModernBertForMultipleChoice,
        *_OF_EVERY_TOKEN,
    ),
    of_every_token=_OF_EVERY_TOKEN,
    replacements=(
        Replacement(
            stock.ModernBertEmbeddings,
            ModernBertEmbeddings,
            "embeddings",
            "embedding",
            "lookup + LayerNorm + dropout",
            covers=("norm", "drop"),
            unsuited=lambda module: why_no_sum(_sum(module)),
        ),
        lookup("tok_embeddings"),
        Replacement(
            stock.ModernBertAttention,
            ModernBertAttention,
            "attention",
            "attention",
            "attention without a T×T tensor",
        ),
        Replacement(
            stock.ModernBertMLP,
            ModernBertMLP,
            "mlp",
            "gated_activation",
            "gated activation",
            covers=("act",),
            unsuited=why_no_activation("act"),
        ),
        Replacement(
            stock.ModernBertPredictionHead,
            ModernBertPredictionHead,
            "mlp",
            "gelu_layer_norm",
            "GELU + LayerNorm",
            covers=("norm", "act"),
            unsuited=lambda module: why_no_layer_norm(module.norm) or why_no_gelu("act")(module),
        ),
        Replacement(
            stock.ModernBertEncoderLayer,
            ModernBertEncoderLayer,
            "packing or trim",
            "",
            "padding left out, last layer for rows that are read",
            pays_in_torch=True,
        ),
        *common_leaves("decoder"),
    ),
    layers=lambda model: model.base_model.layers,
)
