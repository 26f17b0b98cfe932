"""GPT-2: pre-norm blocks, whose dropout + residual + LayerNorm crosses modules. So the block is replaced, and does the
work of its attention and MLP itself."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt2 import modeling_gpt2 as stock
from transformers.pytorch_utils import Conv1D
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from fasttune import ops
from fasttune.patching.families._leaves import common_leaves
from fasttune.patching.families.spec import Family, Replacement
from fasttune.patching.layers.attention import (
    across,
    attend,
    fills,
    fresh_cache,
    into_cache,
    layout_for_attention,
)
from fasttune.patching.layers.entry import mask_for_stock, ordinary, promise
from fasttune.patching.layers.frozen import Linear, Norm, Unknown, activation, known, linear, probability
from fasttune.patching.layers.layer_rows import LayerRows
from fasttune.patching.layers.leaves import (
    Embedding,
    why_no_embedding,
    why_no_layer_norm,
)
from fasttune.patching.layers.patched import Patched
from fasttune.patching.layers.tied import lookup_view
from fasttune.patching.padding.layout import Layout
from fasttune.patching.premises.known import HARMLESS, stock_class, why_replaced, why_unknown, why_watched
from fasttune.patching.promises.later import Later
from fasttune.patching.promises.tensor import PromisedRows


class PreNorm:
    """A block as it was when it was called: a = dropout(out(attention(norm1(x)))) + x, then
    dropout(down(act(up(norm2(a))))) + a."""

    def __init__(self, block: Any) -> None:
        attn, mlp = block.attn, block.mlp
        for module, cls in ((attn, stock.GPT2Attention), (mlp, stock.GPT2MLP)):
            if stock_class(type(module)) is not cls:
                raise Unknown(f"{type(module).__name__} is not the {cls.__name__} it takes the place of")
            why = why_watched(module, HARMLESS if module is attn else ()) or why_replaced(cls)
            if why is not None:
                raise Unknown(why)
        if why_replaced(stock.GPT2Block):
            raise Unknown("the forward of GPT2Block was replaced")
        if attn.reorder_and_upcast_attn and attn.config._attn_implementation == "eager":
            raise Unknown("reorder_and_upcast_attn")
        if attn.is_cross_attention:
            raise Unknown("cross-attention in the place of self-attention")
        patch = block._fasttune
        self.backend = patch.backend
        self.heads, self.head_dim, self.scale = attn.num_heads, attn.head_dim, float(attn.scaling)
        self.width = attn.split_size
        self.norm1, self.norm2 = Norm(block.ln_1), Norm(block.ln_2)
        self.qkv, self.out = linear(attn.c_attn), linear(attn.c_proj)
        self.up, self.down = linear(mlp.c_fc), linear(mlp.c_proj)
        self.act, self.activation = activation(mlp.act)
        self.fused_mlp = bool(self.activation) and patch.settings.options.mlp and type(self.up) is Linear
        known(attn.attn_dropout, nn.Dropout)
        of_attention = float(attn.attn_dropout.p) if attn.training else 0.0  # as stock: the module itself is not called
        self.dropouts = (of_attention, probability(attn.resid_dropout), probability(mlp.dropout))
        parts = (self.norm1, self.norm2, self.qkv, self.out, self.up, self.down)
        self.weights = tuple(weight for part in parts for weight in part.weights)

    def whole(self, hidden: Tensor, layout: Layout) -> tuple[Tensor, tuple[Tensor, ...]]:
        row_ids, packed = layout.packed.indices, layout.packed
        qkv = self.qkv(self.norm1(hidden, self.backend), row_ids).unflatten(-1, (3, self.heads, self.head_dim))
        options: dict[str, Any] = {
            "causal": layout.causal,
            "scale": self.scale,
            "dropout_p": self.dropouts[0],
            "backend": self.backend,
            "cu_seqlens": packed.cu_seqlens,
            "max_seqlen": packed.max_seqlen,
        }
        attended = ops.attention_packed_qkv(qkv, **options)  # its gradient is then written once
        return self.finish(attended.flatten(1), hidden, row_ids), (qkv,)

    def kept(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        if len(tensors) == 1:
            return tensors[0][:, 1], tensors[0][:, 2]
        return tensors[0], tensors[1]

    def keys_and_values(self, hidden: Tensor, row_ids: Tensor) -> tuple[Tensor, Tensor]:
        """A query's product, which can wait, is left out."""
        normed = self.norm1(hidden, self.backend)
        if type(self.qkv) is Linear and self.qkv.transposed and self.qkv.bias is not None:
            both = torch.addmm(self.qkv.bias[self.width :], normed, self.qkv.weight[:, self.width :])
        else:
            both = self.qkv(normed, row_ids)[:, self.width :]
        key, value = both.unflatten(-1, (2, self.heads, self.head_dim)).unbind(1)
        return key, value

    def queries(self, rows: Tensor, row_ids: Tensor) -> Tensor:
        normed = self.norm1(rows, self.backend)
        if type(self.qkv) is Linear and self.qkv.transposed and self.qkv.bias is not None:
            query = torch.addmm(self.qkv.bias[: self.width], normed, self.qkv.weight[:, : self.width])
        else:
            query = self.qkv(normed, row_ids)[:, : self.width]
        return query.unflatten(-1, (self.heads, self.head_dim))

    def finish(self, attended: Tensor, rows: Tensor, row_ids: Tensor | None) -> Tensor:
        projected, norm, backend = self.out(attended, row_ids), self.norm2, self.backend
        normed, after = ops.dropout_add_layer_norm(
            projected,
            rows,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            dropout_p=self.dropouts[1],
            prenorm=True,
            row_ids=row_ids,
            backend=backend,
        )
        if self.fused_mlp:
            product = self.up.product(normed)  # type: ignore[union-attr]
            bias = self.up.bias  # type: ignore[union-attr]
            middle = ops.bias_activation(product, bias, activation=self.activation, backend=backend)  # type: ignore[arg-type]
        else:
            middle = self.act(self.up(normed, row_ids))
        down = self.down(middle, row_ids)
        return ops.dropout(down, dropout_p=self.dropouts[2], residual=after, row_ids=row_ids, backend=backend)


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
        fresh = fresh_cache(past_key_values, self.attn.layer_idx)
        others = {"encoder_hidden_states": encoder_hidden_states, **kwargs}
        if not fresh:
            others["past_key_values"] = past_key_values
        if isinstance(self.attn, stock.GPT2Attention) and self._fasttune.settings.options.norms:
            promised = promise(
                self,
                lambda: PreNorm(self),
                hidden_states,
                attention_mask,
                attention=self.attn,
                heads=self.attn.num_heads,
                head_dim=self.attn.head_dim,
                arguments=others,
            )
            if promised is not None:
                if fresh and past_key_values is not None:
                    _fill(past_key_values, self.attn.layer_idx, promised)
                return promised
        attention_mask = mask_for_stock(hidden_states, attention_mask, self.attn, kwargs)
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


@dataclass(eq=False)
class _Cached:
    """Keys (part 0) or values (part 1) of every token (B, H, S, D), for a cache: computed when somebody looks."""

    source: LayerRows
    part: int

    def __call__(self) -> Tensor:
        source = self.source
        keys_and_values = source.keys_and_values_of_all()
        return keys_and_values[self.part].unflatten(0, source.layout.shape).transpose(1, 2)


def _fill(cache: Any, layer_idx: int, promised: PromisedRows) -> None:
    """Hands the cache what stock would have put into it."""
    source: Any = promised.state.source
    shape = (source.layout.shape[0], source.layer.heads, source.layout.shape[1], source.layer.head_dim)
    key, value = (Later.of(_Cached(source, part), shape, source.dtype, source.device) for part in (0, 1))
    into_cache(cache, key, value, layer_idx)


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
        Replacement(
            stock.GPT2Block,
            GPT2Block,
            "packing or trim",
            "",
            "padding left out, last layer for rows that are read",
            unsuited=lambda module: why_no_layer_norm(module.ln_2),
            pays_in_torch=True,
        ),
        Replacement(
            stock.GPT2Attention,
            GPT2Attention,
            "attention",
            "attention",
            "attention without a T×T tensor",
            covers=("attn_dropout",),
        ),
        Replacement(stock.GPT2MLP, GPT2MLP, "mlp", "bias_activation", "bias + activation", covers=("act",)),
        Replacement(
            nn.Embedding,
            Embedding,
            "embeddings",
            "embedding",
            "lookup with a deterministic gradient",
            only=("wte", "wpe"),
            unsuited=why_no_embedding,
        ),
        *common_leaves("lm_head", "score"),
    ),
    layers=lambda model: model.base_model.h,
)
