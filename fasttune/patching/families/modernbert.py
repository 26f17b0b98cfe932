"""ModernBERT: pre-norm layers with rotary positions, two of three with a sliding window, gated MLPs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.modernbert import modeling_modernbert as stock

from fasttune.patching.families import _modernbert_like as shared
from fasttune.patching.layers.attention import attend, layout_for_attention
from fasttune.patching.layers.captured import Parts
from fasttune.patching.layers.entry import ordinary
from fasttune.patching.layers.patched import Patched
from fasttune.patching.layers.projections import Fused, Rotary

_TURN = stock.apply_rotary_pos_emb  # others replace it for the whole process


class ModernBertEmbeddings(shared.Embeddings, stock.ModernBertEmbeddings): ...


class ModernBertMLP(shared.MLP, stock.ModernBertMLP): ...


class ModernBertPredictionHead(shared.PredictionHead, stock.ModernBertPredictionHead): ...


class ModernBertEncoderLayer(shared.Layer, stock.ModernBertEncoderLayer):
    def parts(self, positions: Any = None) -> Parts:
        shared.check_turn(stock, _TURN)
        project = Fused(self.attn.Wqkv, *self.heads(self.attn), Rotary(*positions))
        return self.parts_around(project, self.attn.head_dim**-0.5, stock.ModernBertAttention, stock.ModernBertMLP)

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


class ModernBertAttention(Patched, stock.ModernBertAttention):
    """Self-attention without a T×T tensor, in layers that run as they stand."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        layout, backend, window = None, self._fasttune.backend, shared.window_of(self)
        plain = hidden_states.dim() == 3 and 0 not in hidden_states.shape
        plain = plain and Rotary.fits(position_embeddings, hidden_states, self.head_dim)
        if plain and shared.why_turned_otherwise(stock, _TURN) is None:
            layout = layout_for_attention(self, hidden_states, attention_mask, self.head_dim, kwargs, window)
        if layout is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        qkv = self.Wqkv(hidden_states).unflatten(-1, (3, -1, self.head_dim))
        query, key, value = Rotary(*position_embeddings).of_batch(qkv, 2, backend).unbind(-3)
        p = self.attention_dropout if self.training else 0.0
        out = attend(query, key, value, layout, scale=self.head_dim**-0.5, dropout_p=p, backend=backend)
        return self.out_drop(self.Wo(out.flatten(2))), None


FAMILY = shared.modernbert_like(
    "modernbert",
    stock,
    globals(),
    prefix="ModernBert",
    layer="EncoderLayer",
    pooled=("Model", "ForSequenceClassification", "ForMultipleChoice"),
    of_every_token=("ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering"),
)
