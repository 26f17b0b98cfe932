"""GPT-2: pre-norm blocks, whose dropout + residual + LayerNorm crosses modules. So the block is replaced, and calls its
attention and MLP for what they compute before their own dropout."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2 as stock
from transformers.pytorch_utils import Conv1D

from fasttune import ops
from fasttune.patching.attention import attention_of_qkv, attentions_wanted
from fasttune.patching.families._activations import gelu_kind, why_no_gelu
from fasttune.patching.layers import (
    DROPOUTS,
    LAYER_NORMS,
    Dropout,
    Embedding,
    Patched,
    common_leaves,
    dropout_probability,
    why_no_embedding,
    why_no_layer_norm,
)
from fasttune.patching.plain import why_not_plain
from fasttune.patching.rows import all_rows, labelled, labelled_next, labelled_next_and_choice, last_token
from fasttune.patching.spec import Family, Replacement


class GPT2MLP(Patched, stock.GPT2MLP):
    def forward(self, hidden_states: Any) -> Tensor:
        return self.dropout(self.undropped(hidden_states))

    def undropped(self, hidden_states: Tensor) -> Tensor:
        """c_proj(GELU(c_fc(x))), the bias of c_fc added in the activation's pass."""
        patch, c_fc, kind = self._fasttune, self.c_fc, gelu_kind(self.act)
        why = why_not_plain(c_fc, Conv1D) or ("hooks on the activation" if not kind else None)
        if why is not None or not patch.fused(hidden_states):
            if why is not None:
                patch.aside(why)
            return self.c_proj(self.act(c_fc(hidden_states)))
        product = hidden_states.reshape(-1, hidden_states.shape[-1]) @ c_fc.weight
        activated = ops.bias_gelu(product, c_fc.bias, approximate=kind, backend=patch.backend)
        return self.c_proj(activated.view(*hidden_states.shape[:-1], c_fc.nf))


class GPT2Block(Patched, stock.GPT2Block):
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
        patch = self._fasttune
        why = "cross-attention" if encoder_hidden_states is not None else self._why_not_fused()
        if why is not None or not patch.fused(hidden_states):
            if why is not None:
                patch.aside(why)
            return stock.GPT2Block.forward(
                self,
                hidden_states,
                past_key_values,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                use_cache=use_cache,
                **kwargs,
            )
        attended = self._attend(self.ln_1(hidden_states), past_key_values, attention_mask, use_cache, kwargs)
        norm, backend = self.ln_2, patch.backend
        normed, hidden_states = ops.dropout_add_layer_norm(
            attended,
            hidden_states,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            dropout_p=dropout_probability(self.attn.resid_dropout),
            prenorm=True,
            backend=backend,
        )
        mlp = self.mlp
        transformed = mlp.undropped(normed) if type(mlp) is GPT2MLP else mlp.c_proj(mlp.act(mlp.c_fc(normed)))
        return ops.dropout(
            transformed, dropout_p=dropout_probability(mlp.dropout), residual=hidden_states, backend=backend
        )

    def _why_not_fused(self) -> str | None:
        attn, mlp = self.attn, self.mlp
        return (
            _why_attention_not_plain(attn)
            or why_not_plain(attn.resid_dropout, *DROPOUTS)
            or why_not_plain(self.ln_2, *LAYER_NORMS)
            or why_not_plain(mlp, GPT2MLP, stock.GPT2MLP)
            or why_not_plain(mlp.dropout, *DROPOUTS)
        )

    def _attend(
        self, normed: Tensor, past_key_values: Any, attention_mask: Tensor | None, use_cache: Any, kwargs: Any
    ) -> Tensor:
        """Self-attention up to and including its output projection."""
        attn = self.attn
        projected = attn.c_attn(normed)
        query, key, value = (
            part.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for part in projected.split(attn.split_size, dim=-1)
        )
        fresh = True  # keys and values are those of this very call
        if past_key_values is not None:
            cache = past_key_values
            if isinstance(cache, EncoderDecoderCache):
                cache = cache.self_attention_cache
            cached_key, cached_value = cache.update(key, value, attn.layer_idx)
            # An empty cache hands back a copy of what it was given. Attention reads the original: no gradient has to
            # pass through the copy.
            fresh = cached_key.shape == key.shape and type(cache.layers[attn.layer_idx]) is DynamicLayer
            if not fresh:
                key, value = cached_key, cached_value
        options = {"dropout": attn.attn_dropout.p if attn.training else 0.0, "scaling": attn.scaling}
        attended = None
        if fresh and attn.is_causal:
            qkv = projected.unflatten(-1, (3, attn.num_heads, attn.head_dim))
            attended = attention_of_qkv(attn, qkv, attention_mask, **options)
        if attended is None:
            name = attn.config._attn_implementation
            function = ALL_ATTENTION_FUNCTIONS.get_interface(name, stock.eager_attention_forward)
            attended, _ = function(attn, query, key, value, attention_mask, use_cache=use_cache, **options, **kwargs)
        return attn.c_proj(attended.reshape(normed.shape))


def _why_attention_not_plain(attn: Any) -> str | None:
    """As `why_not_plain`, except that Transformers leaves hooks on attention modules for good once attention weights
    were asked for; they do nothing unless these are asked for again."""
    if attn.config._attn_implementation == "eager" and attn.reorder_and_upcast_attn:
        return "reorder_and_upcast_attn"
    if attentions_wanted():
        return "attention weights were asked for"
    foreign = [h for h in attn._forward_hooks.values() if h.__module__ != "transformers.utils.output_capturing"]
    if attn._forward_hooks and not foreign and type(attn) is stock.GPT2Attention:
        rest = attn._forward_pre_hooks or attn._backward_hooks or attn._backward_pre_hooks
        return "hooks on GPT2Attention" if rest else None
    return why_not_plain(attn, stock.GPT2Attention)


FAMILY = Family(
    name="gpt2",
    heads={
        stock.GPT2Model: all_rows,
        stock.GPT2LMHeadModel: labelled_next,
        stock.GPT2DoubleHeadsModel: labelled_next_and_choice,
        stock.GPT2ForSequenceClassification: last_token,
        stock.GPT2ForTokenClassification: labelled,
        stock.GPT2ForQuestionAnswering: all_rows,
    },
    replacements=(
        Replacement(
            stock.GPT2Block,
            GPT2Block,
            "norms",
            "dropout_add_layer_norm",
            "dropout + residual + LayerNorm, dropout + residual",
            covers=("ln_2", "attn.resid_dropout", "mlp.dropout"),
            unsuited=lambda module: why_no_layer_norm(module.ln_2),
        ),
        Replacement(
            stock.GPT2MLP,
            GPT2MLP,
            "mlp",
            "bias_gelu",
            "bias + GELU",
            covers=("act",),
            unsuited=why_no_gelu("act"),
        ),
        Replacement(
            nn.Embedding,
            Embedding,
            "embeddings",
            "embedding",
            "lookup with a deterministic gradient",
            only=("wte", "wpe"),
            unsuited=why_no_embedding,
        ),
        Replacement(nn.Dropout, Dropout, "embeddings", "dropout", "dropout", only=("drop",)),
        *common_leaves("lm_head"),
    ),
    attentions=(stock.GPT2Attention,),
)
