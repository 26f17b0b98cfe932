"""ESM-2: pre-norm layers with rotary positions, over amino acids."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers.models.esm import modeling_esm as stock

from fasttune.patching.families._leaves import common_leaves, lookup, whole_layer
from fasttune.patching.families.spec import Family, Replacement
from fasttune.patching.layers.attention import attend, layout_for_attention
from fasttune.patching.layers.captured import Parts
from fasttune.patching.layers.entry import ordinary
from fasttune.patching.layers.frozen import Unknown
from fasttune.patching.layers.leaves import Linear, why_no_layer_norm
from fasttune.patching.layers.mlp import dense_activation, transform
from fasttune.patching.layers.patched import Patched
from fasttune.patching.layers.pre_norm import PreNorm
from fasttune.patching.layers.projections import Rotary, Separate
from fasttune.patching.layers.promised import PromisedLayer

_SHIPPED = (stock.apply_rotary_pos_emb, stock.gelu)  # others may replace them for the whole process


def _as_shipped() -> bool:
    return (stock.apply_rotary_pos_emb, stock.gelu) == _SHIPPED


class EsmLayer(PromisedLayer, stock.EsmLayer):
    captured = PreNorm

    def attends(self) -> Any:
        attention = getattr(self.attention, "self", None)
        return attention if isinstance(attention, stock.EsmSelfAttention) else None

    def parts(self, positions: Any = None) -> Parts:
        if not _as_shipped():
            raise Unknown("apply_rotary_pos_emb or gelu was replaced for the whole process")
        attention, attend = self.attention, self.attention.self
        rotary = Rotary(*positions) if attend.position_embedding_type == "rotary" else None
        return Parts(
            inside=(
                (attention, stock.EsmAttention),
                (attend, stock.EsmSelfAttention),
                (attention.output, stock.EsmSelfOutput),
                (self.intermediate, stock.EsmIntermediate),
                (self.output, stock.EsmOutput),
            ),
            attend=attend,
            project=Separate(attend.query, attend.key, attend.value, attend.attention_head_size, rotary),
            scale=_scale(attend),
            attention_dropout=attend.dropout,
            out=attention.output.dense,
            out_dropout=attention.output.dropout,
            norm1=attention.LayerNorm,
            up=self.intermediate.dense,
            act=F.gelu,
            down=self.output.dense,
            down_dropout=self.output.dropout,
            norm2=self.LayerNorm,
        )

    def forward(
        self,
        hidden_states: Any,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Any:
        others = {"encoder_hidden_states": encoder_hidden_states if self.is_decoder else None, **kwargs}
        out, attention_mask = self.promised(hidden_states, attention_mask, others, position_embeddings)
        if out is not None:
            return out
        hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask = ordinary(
            hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask
        )
        return super().forward(
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            position_embeddings,
            **kwargs,
        )


def _scale(attention: Any) -> float:
    """Stock scales the queries before they are turned, which is the same."""
    return float(attention.scaling) * float(attention.attention_head_size) ** -0.5


class EsmSelfAttention(Patched, stock.EsmSelfAttention):
    """Self-attention without a T×T tensor, in layers that run as they stand."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Any:
        layout, backend = None, self._fasttune.backend
        plain = encoder_hidden_states is None and hidden_states.dim() == 3 and 0 not in hidden_states.shape
        if plain and self.position_embedding_type == "rotary":
            plain = Rotary.fits(position_embeddings, hidden_states, self.attention_head_size)
        if plain and _as_shipped():
            layout = layout_for_attention(self, hidden_states, attention_mask, self.attention_head_size, kwargs)
        if layout is None:
            others = (encoder_hidden_states, encoder_attention_mask, position_embeddings)
            return super().forward(hidden_states, attention_mask, *others, **kwargs)
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.attention_head_size))
            for project in (self.query, self.key, self.value)
        )
        if self.position_embedding_type == "rotary":
            turn = Rotary(*position_embeddings)
            query, key = turn.of_batch(query, None, backend), turn.of_batch(key, None, backend)
        p = self.dropout if self.training else 0.0
        out = attend(query, key, value, layout, scale=_scale(self), dropout_p=p, backend=backend)
        return out.flatten(2), None


class EsmIntermediate(Patched, stock.EsmIntermediate):
    def forward(self, hidden_states: Tensor) -> Tensor:
        out = dense_activation(self, hidden_states, self.dense, F.gelu) if _as_shipped() else None
        return super().forward(hidden_states) if out is None else out


class EsmLMHead(Patched, stock.EsmLMHead):
    def forward(self, features: Tensor, **kwargs: Any) -> Tensor:
        transformed = transform(self, features, self.dense, F.gelu, self.layer_norm) if _as_shipped() else None
        if transformed is None:
            return super().forward(features, **kwargs)
        decoder = self.decoder
        return decoder.plus(transformed, self.bias) if isinstance(decoder, Linear) else decoder(transformed) + self.bias


_OF_EVERY_TOKEN = (stock.EsmForMaskedLM, stock.EsmForTokenClassification)

FAMILY = Family(
    name="esm",
    heads=(stock.EsmModel, stock.EsmForSequenceClassification, *_OF_EVERY_TOKEN),
    of_every_token=_OF_EVERY_TOKEN,
    replacements=(
        lookup("word_embeddings"),
        Replacement(
            stock.EsmSelfAttention,
            EsmSelfAttention,
            "attention",
            "attention",
            "attention without a T×T tensor",
        ),
        Replacement(stock.EsmIntermediate, EsmIntermediate, "mlp", "bias_activation", "bias + activation"),
        Replacement(
            stock.EsmLMHead,
            EsmLMHead,
            "mlp",
            "gelu_layer_norm",
            "GELU + LayerNorm",
            covers=("layer_norm",),
            unsuited=lambda module: why_no_layer_norm(module.layer_norm),
        ),
        whole_layer(stock.EsmLayer, EsmLayer),
        *common_leaves("decoder"),
    ),
)
