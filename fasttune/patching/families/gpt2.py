"""GPT-2: pre-norm blocks, whose dropout + residual + LayerNorm crosses modules. So the block is replaced, and does the
work of its attention and MLP itself."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers.models.gpt2 import modeling_gpt2 as stock
from transformers.pytorch_utils import Conv1D
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from fasttune import ops
from fasttune.patching.families._leaves import common_leaves, lookup, whole_layer
from fasttune.patching.families.spec import Family, Replacement
from fasttune.patching.layers.attention import (
    across,
    attend,
    fills,
    fresh_cache,
    into_cache,
    layout_for_attention,
)
from fasttune.patching.layers.caching import fill
from fasttune.patching.layers.captured import Parts
from fasttune.patching.layers.entry import ordinary
from fasttune.patching.layers.frozen import Linear, Unknown, activation, linear
from fasttune.patching.layers.leaves import (
    Embedding,
    why_no_layer_norm,
)
from fasttune.patching.layers.patched import Patched
from fasttune.patching.layers.pre_norm import PreNorm
from fasttune.patching.layers.projections import Fused
from fasttune.patching.layers.promised import PromisedLayer
from fasttune.patching.layers.tied import lookup_view
from fasttune.patching.premises.known import why_replaced, why_unknown, why_watched
from fasttune.patching.promises.tensor import PromisedRows


class GPT2Block(PromisedLayer, stock.GPT2Block):
    captured = PreNorm

    def attends(self) -> Any:
        return self.attn if isinstance(self.attn, stock.GPT2Attention) else None

    def heads(self, attention: Any) -> tuple[int, int]:
        return attention.num_heads, attention.head_dim

    def parts(self, positions: Any = None) -> Parts:
        attn, mlp = self.attn, self.mlp
        if attn.reorder_and_upcast_attn and attn.config._attn_implementation == "eager":
            raise Unknown("reorder_and_upcast_attn")
        if attn.is_cross_attention:
            raise Unknown("cross-attention in the place of self-attention")
        return Parts(
            inside=((attn, stock.GPT2Attention), (mlp, stock.GPT2MLP)),
            attend=attn,
            project=Fused(attn.c_attn, attn.num_heads, attn.head_dim),
            scale=attn.scaling,
            attention_dropout=attn.attn_dropout,
            out=attn.c_proj,
            out_dropout=attn.resid_dropout,
            norm1=self.ln_1,
            up=mlp.c_fc,
            act=mlp.act,
            down=mlp.c_proj,
            down_dropout=mlp.dropout,
            norm2=self.ln_2,
        )

    def forward(
        self,
        hidden_states: Any,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        fresh = fresh_cache(past_key_values, self.attn.layer_idx)
        others = {"encoder_hidden_states": encoder_hidden_states, **kwargs}
        if not fresh:
            others["past_key_values"] = past_key_values
        promised, attention_mask = self.promised(hidden_states, attention_mask, others)
        if promised is not None:
            if past_key_values is not None:
                fill(past_key_values, self.attn.layer_idx, promised, *self.heads(self.attn))
            return promised
        hidden_states, attention_mask, encoder_attention_mask = ordinary(
            hidden_states, attention_mask, encoder_attention_mask
        )
        if not isinstance(getattr(self, "crossattention", None), GPT2Attention):
            (encoder_hidden_states,) = ordinary(encoder_hidden_states)
        out: Tensor = stock.GPT2Block.forward(
            self,
            hidden_states,
            past_key_values,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        return out


class GPT2Model(Patched, stock.GPT2Model):
    """Looks the tokens up itself, by an alias of a weight that the head shares, and hands the head's alias on with the
    hidden states."""

    def forward(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        table: Any = self.wte
        plain = input_ids is not None and input_ids.dim() == 2 and kwargs.get("inputs_embeds") is None and len(args) < 5
        plain = plain and type(table) is Embedding and why_watched(table) is None
        tied = lookup_view(table) if plain and table._fasttune.fused(table.weight) else None
        if tied is None:
            return super().forward(input_ids, *args, **kwargs)
        assert input_ids is not None
        self.warn_if_padding_and_no_attention_mask(
            input_ids, args[1] if len(args) > 1 else kwargs.get("attention_mask")
        )
        backend = table._fasttune.backend
        embedded = ops.embedding(input_ids, tied[1], padding_idx=table.padding_idx, sparse_grad=True, backend=backend)
        out = super().forward(None, *args, **{**kwargs, "inputs_embeds": embedded})
        hidden = out[0] if isinstance(out, tuple) else out.last_hidden_state
        if isinstance(hidden, PromisedRows):
            hidden.state.source.tied = tied[0], tied[2]
        return out


# Whoever looks which arguments a model takes (a Trainer, for the columns of a data set) finds stock's.
GPT2Model.forward.__signature__ = inspect.signature(stock.GPT2Model.forward)  # type: ignore[attr-defined]

# Transformers keeps what a model can record of its outputs by the name of its class.
dict.__setitem__(_CAN_RECORD_REGISTRY, str(GPT2Model), stock.GPT2Model._can_record_outputs)


class GPT2MLP(Patched, stock.GPT2MLP):
    def forward(self, hidden_states: Any) -> Tensor:
        patch, c_fc = self._fasttune, self.c_fc
        try:
            _, kind = activation(self.act)
            up = linear(c_fc)
            why = None if kind and type(up) is Linear and up.bias is not None else ""
            why = why_replaced(stock.GPT2MLP) or why
        except Unknown as unknown:
            why = str(unknown)
        if why is not None or not patch.fused(hidden_states):
            if why:
                patch.aside(why)
            return super().forward(hidden_states)
        patch.note()
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        activated = ops.bias_activation(up.product(flat), up.bias, activation=kind, backend=patch.backend)  # type: ignore[union-attr, arg-type]
        return self.dropout(self.c_proj(activated.view(*hidden_states.shape[:-1], c_fc.nf)))


class GPT2Attention(Patched, stock.GPT2Attention):
    """Self-attention without a T×T tensor, in blocks that run as they stand."""

    def forward(
        self,
        hidden_states: Any,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> Any:
        layout, p = None, self.attn_dropout.p if self.training else 0.0
        fresh = fresh_cache(past_key_values, self.layer_idx) and encoder_hidden_states is None
        others = {"output_attentions": output_attentions, **kwargs}
        heads = (-1, self.head_dim)
        crosses = encoder_hidden_states is not None and self.is_cross_attention
        if crosses and fills(past_key_values, self.layer_idx):

            def project(states: Tensor) -> tuple[Tensor, Tensor]:
                key, value = self.c_attn(states).split(self.split_size, -1)
                return key.unflatten(-1, heads), value.unflatten(-1, heads)

            crossed = across(
                self,
                self.q_attn(hidden_states).unflatten(-1, heads),
                encoder_hidden_states,  # type: ignore[arg-type]
                project,
                past_key_values,
                encoder_attention_mask,
                rowwise=why_unknown(self.c_attn, Conv1D) is None,
                scale=self.scaling,
                dropout_p=p,
                arguments=others,
            )
            if crossed is not None:
                return self.resid_dropout(self.c_proj(crossed.flatten(2))), None
        upcast = self.reorder_and_upcast_attn and self.config._attn_implementation == "eager"
        if fresh and not upcast and hidden_states.dim() == 3 and 0 not in hidden_states.shape:
            layout = layout_for_attention(self, hidden_states, attention_mask, self.head_dim, others)
        if layout is None:
            return super().forward(
                hidden_states,
                past_key_values,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                output_attentions,
                **kwargs,
            )
        parts = self.c_attn(hidden_states).split(self.split_size, dim=2)
        query, key, value = (part.unflatten(-1, heads) for part in parts)
        into_cache(past_key_values, key.transpose(1, 2), value.transpose(1, 2), self.layer_idx)
        out = attend(query, key, value, layout, scale=self.scaling, dropout_p=p, backend=self._fasttune.backend)
        return self.resid_dropout(self.c_proj(out.flatten(2))), None


_OF_EVERY_TOKEN = (
    stock.GPT2LMHeadModel,
    stock.GPT2DoubleHeadsModel,
    stock.GPT2ForTokenClassification,
    stock.GPT2ForQuestionAnswering,
)

FAMILY = Family(
    name="gpt2",
    heads=(stock.GPT2Model, stock.GPT2ForSequenceClassification, *_OF_EVERY_TOKEN),
    of_every_token=_OF_EVERY_TOKEN,
    replacements=(
        Replacement(
            stock.GPT2Model,
            GPT2Model,
            "embeddings",
            "embedding",
            "one gradient for a tied weight",
        ),
        whole_layer(stock.GPT2Block, GPT2Block, unsuited=lambda module: why_no_layer_norm(module.ln_2)),
        Replacement(
            stock.GPT2Attention,
            GPT2Attention,
            "attention",
            "attention",
            "attention without a T×T tensor",
            covers=("attn_dropout",),
        ),
        Replacement(stock.GPT2MLP, GPT2MLP, "mlp", "bias_activation", "bias + activation", covers=("act",)),
        lookup("wte", "wpe"),
        *common_leaves("lm_head", "score"),
    ),
)
