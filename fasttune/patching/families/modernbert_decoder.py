"""ModernBERT's decoder: causal, with query, key and value by themselves, and a cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.modernbert_decoder import modeling_modernbert_decoder as stock

from fasttune.patching.families import _modernbert_like as shared
from fasttune.patching.layers.attention import attend, fresh_cache, into_cache, layout_for_attention
from fasttune.patching.layers.caching import fill
from fasttune.patching.layers.captured import Parts
from fasttune.patching.layers.entry import ordinary
from fasttune.patching.layers.patched import Patched
from fasttune.patching.layers.projections import Rotary, Separate

_TURN = stock.apply_rotary_pos_emb  # others replace it for the whole process


class ModernBertDecoderEmbeddings(shared.Embeddings, stock.ModernBertDecoderEmbeddings): ...


class ModernBertDecoderMLP(shared.MLP, stock.ModernBertDecoderMLP): ...


class ModernBertDecoderPredictionHead(shared.PredictionHead, stock.ModernBertDecoderPredictionHead): ...


class ModernBertDecoderLayer(shared.Layer, stock.ModernBertDecoderLayer):
    def parts(self, positions: Any = None) -> Parts:
        shared.check_turn(stock, _TURN)
        attn = self.attn
        project = Separate(attn.q_proj, attn.k_proj, attn.v_proj, attn.head_dim, Rotary(*positions))
        return self.parts_around(project, attn.scaling, stock.ModernBertDecoderAttention, stock.ModernBertDecoderMLP)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        others, fresh = dict(kwargs), fresh_cache(past_key_values, self.layer_idx)
        if not fresh:
            others["past_key_values"] = past_key_values
        out, attention_mask = self.promised(hidden_states, attention_mask, others, position_embeddings)
        if out is not None:
            if past_key_values is not None:
                fill(past_key_values, self.layer_idx or 0, out, *self.heads(self.attn))
            return out
        hidden_states, attention_mask = ordinary(hidden_states, attention_mask)
        return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)


class ModernBertDecoderAttention(Patched, stock.ModernBertDecoderAttention):
    """Self-attention without a T×T tensor, in layers that run as they stand."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any,
        attention_mask: Any,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        layout, backend, window = None, self._fasttune.backend, shared.window_of(self)
        plain = fresh_cache(past_key_values, self.layer_idx) and hidden_states.dim() == 3
        plain = plain and Rotary.fits(position_embeddings, hidden_states, self.head_dim)
        if plain and 0 not in hidden_states.shape and shared.why_turned_otherwise(stock, _TURN) is None:
            layout = layout_for_attention(self, hidden_states, attention_mask, self.head_dim, kwargs, window)
        if layout is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        turn = Rotary(*position_embeddings)
        query, key = turn.of_batch(query, None, backend), turn.of_batch(key, None, backend)
        into_cache(past_key_values, key.transpose(1, 2), value.transpose(1, 2), self.layer_idx or 0)
        p = self.attention_dropout if self.training else 0.0
        out = attend(query, key, value, layout, scale=self.scaling, dropout_p=p, backend=backend)
        return self.out_drop(self.Wo(out.flatten(2))), None


FAMILY = shared.modernbert_like(
    "modernbert_decoder",
    stock,
    globals(),
    prefix="ModernBertDecoder",
    layer="Layer",
    pooled=("Model", "ForSequenceClassification"),
    of_every_token=("ForCausalLM",),
)
