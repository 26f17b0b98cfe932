"""GPT-2: pre-norm blocks, whose dropout + residual + LayerNorm crosses modules. So the block is replaced, and calls its
attention and MLP for what they compute before their own dropout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2 as stock
from transformers.pytorch_utils import Conv1D

from fasttune import ops
from fasttune.ops.packing import PackedBatch
from fasttune.patching.attention import NAMES, attention_of_qkv, attentions_wanted
from fasttune.patching.families._activations import gelu_kind, why_no_gelu
from fasttune.patching.last_layer import Chosen, on_demand, other_dropout
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
from fasttune.patching.plan import plan_of
from fasttune.patching.rows import (
    all_rows,
    for_the_caller,
    labelled_next,
    labelled_next_and_choice,
    labelled_tokens,
    last_token,
)
from fasttune.patching.spec import Family, Replacement
from fasttune.patching.stack import entering, leaving


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
        plan = plan_of(attention_mask)
        shape = (hidden_states.shape[0], hidden_states.shape[1]) if plan is None else plan.packed.shape
        if plan is not None and plan.across:
            hidden_states = entering(self, hidden_states, plan)
        patch = self._fasttune
        why = "cross-attention" if encoder_hidden_states is not None else self._why_not_fused()
        if why is not None or not patch.fused(hidden_states):
            if why is not None:
                patch.aside(why)
            out = stock.GPT2Block.forward(
                self,
                hidden_states,
                past_key_values,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                use_cache=use_cache,
                **kwargs,
            )
        else:
            if attention_mask is None or plan is not None:
                rows = on_demand(self, hidden_states, plan, shape, past_key_values)
                if rows is not None:
                    return rows
            attended = self._attend(self.ln_1(hidden_states), past_key_values, attention_mask, use_cache, kwargs)
            row_ids = plan.packed.indices if plan is not None and plan.across else None
            out = self._finish(attended, hidden_states, row_ids)
        return leaving(self, out, plan) if plan is not None and plan.across else out

    def _finish(self, attended: Tensor, hidden_states: Tensor, row_ids: Tensor | None) -> Tensor:
        """From the output of attention to the output of the block; row_ids: as in ops.dropout."""
        norm, mlp, backend = self.ln_2, self.mlp, self._fasttune.backend
        normed, hidden_states = ops.dropout_add_layer_norm(
            attended,
            hidden_states,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            dropout_p=dropout_probability(self.attn.resid_dropout),
            prenorm=True,
            row_ids=row_ids,
            backend=backend,
        )
        transformed = mlp.undropped(normed) if type(mlp) is GPT2MLP else mlp.c_proj(mlp.act(mlp.c_fc(normed)))
        return ops.dropout(
            transformed,
            dropout_p=dropout_probability(mlp.dropout),
            residual=hidden_states,
            row_ids=row_ids,
            backend=backend,
        )

    @property
    def causal(self) -> bool:
        return bool(self.attn.is_causal)

    def why_not_packed(self, inputs: Mapping[str, Any]) -> str | None:
        """Why hidden states (1, T, E) would not do for this block."""
        return self._why_not_fused()

    def why_not_trimmed(self) -> str | None:
        """Why this block's rows cannot be computed apart from each other, on top of what keeps it from being fused."""
        attn = self.attn
        if attn.config._attn_implementation not in NAMES.values():
            return "attention is stock's"
        return other_dropout(self, (attn.attn_dropout, attn.resid_dropout, self.mlp.dropout))

    def prepare(self, hidden: Tensor, packed: PackedBatch, causal: bool, cache: Any) -> BlockRows:
        """What all rows contribute, (T, E): keys and values; a query's product where it can wait is left out."""
        attn, normed = self.attn, self.ln_1(hidden)
        width, query = attn.split_size, None
        if why_not_plain(attn.c_attn, Conv1D) is None:
            weight, bias = attn.c_attn.weight[:, width:], attn.c_attn.bias[width:]
            both = torch.addmm(bias, normed, weight)
        else:
            query, both = attn.c_attn(normed).split((width, 2 * width), dim=-1)
        key, value = both.unflatten(-1, (2, attn.num_heads, attn.head_dim)).unbind(1)
        if cache is not None:
            _update(cache, attn.layer_idx, *(ops.unpack(part, packed).transpose(1, 2) for part in (key, value)))
        return BlockRows(causal, normed, query, key, value)

    def rows_of(self, chosen: Chosen, rows: Tensor, prepared: BlockRows) -> Tensor:
        """The block's output (R, E) for the chosen rows, `rows` (R, E) of its input."""
        attn, width = self.attn, self.attn.split_size
        if prepared.query is None:
            weight, bias = attn.c_attn.weight[:, :width], attn.c_attn.bias[:width]
            query = torch.addmm(bias, chosen.of(prepared.normed), weight)
        else:
            query = chosen.of(prepared.query)
        attended = chosen.attend(
            query.unflatten(-1, (attn.num_heads, attn.head_dim)),
            prepared.key,
            prepared.value,
            causal=prepared.causal,
            scale=attn.scaling,
            dropout_p=dropout_probability(attn.attn_dropout),
            backend=self._fasttune.backend,
        )
        return self._finish(attn.c_proj(attended), rows, chosen.row_ids)

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
            plan = plan_of(attention_mask)
            across = plan is not None and plan.across  # then the cache is empty, and wants (B, H, S, D)
            padded = [_padded(part, plan) if across else part for part in (key, value)]
            cached_key, cached_value, dynamic = _update(past_key_values, attn.layer_idx, *padded)
            # An empty cache hands back a copy of what it was given. Attention reads the original: no gradient has to
            # pass through the copy.
            fresh = across or (cached_key.shape == key.shape and dynamic)
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


@dataclass
class BlockRows:
    """What the last block has computed before anybody asks for rows: normed (T, E), query (T, E) or None, key and value
    (T, H, D)."""

    causal: bool
    normed: Tensor
    query: Tensor | None
    key: Tensor
    value: Tensor


def _update(cache: Any, layer_idx: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Keys and values (B, H, S, D) of a cache that takes these in, and whether it simply grows."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    keys, values = cache.update(key, value, layer_idx)
    return keys, values, type(cache.layers[layer_idx]) is DynamicLayer


def _padded(part: Tensor, plan: Any) -> Tensor:
    """(1, H, T, D) to (B, H, S, D)."""
    return ops.unpack(part[0].transpose(0, 1), plan.packed).transpose(1, 2)


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
        stock.GPT2Model: for_the_caller,
        stock.GPT2LMHeadModel: labelled_next,
        stock.GPT2DoubleHeadsModel: labelled_next_and_choice,
        stock.GPT2ForSequenceClassification: last_token,
        stock.GPT2ForTokenClassification: labelled_tokens,
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
        *common_leaves("lm_head", "score"),
    ),
    attentions=(stock.GPT2Attention,),
    layers=lambda model: model.base_model.h,
)
