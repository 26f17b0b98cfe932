"""What BERT and its relatives share: post-norm layers.

A relative names its classes (they must live in its own file, under their stock names, for copies to find them), says
how its embeddings count positions and where its language-model head is; `bert_like` makes the family of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from fasttune import ops
from fasttune.patching.families._leaves import common_leaves, lookup
from fasttune.patching.families.spec import Family, Replacement
from fasttune.patching.layers import promised
from fasttune.patching.layers.attention import across, fills, fresh_cache, self_attention
from fasttune.patching.layers.captured import Parts
from fasttune.patching.layers.embeddings import Sum, sum_norm_dropout, why_no_sum
from fasttune.patching.layers.entry import ordinary
from fasttune.patching.layers.leaves import why_no_layer_norm
from fasttune.patching.layers.mlp import dense_activation, transform, why_no_activation
from fasttune.patching.layers.patched import Patched
from fasttune.patching.layers.projections import Separate
from fasttune.patching.premises.known import stock_class, why_replaced, why_unknown


class PromisedLayer(promised.PromisedLayer):
    """A layer that may be a decoder's, too."""

    def attends(self) -> Any:
        attention = getattr(self.attention, "self", None)
        return attention if hasattr(attention, "attention_head_size") else None

    def parts(self, positions: Any = None) -> Parts:
        attention, attend = self.attention, self.attention.self
        stock, names = stock_class(type(self)), type(self).__name__.removesuffix("Layer")
        inside = {
            "Attention": attention,
            "SelfAttention": attend,
            "SelfOutput": attention.output,
            "Intermediate": self.intermediate,
            "Output": self.output,
        }
        return Parts(
            inside=tuple((part, getattr(sys.modules[stock.__module__], f"{names}{n}")) for n, part in inside.items()),
            attend=attend,
            project=Separate(attend.query, attend.key, attend.value, attend.attention_head_size),
            scale=attend.scaling,
            attention_dropout=attend.dropout,
            out=attention.output.dense,
            out_dropout=attention.output.dropout,
            norm1=attention.output.LayerNorm,
            up=self.intermediate.dense,
            act=self.intermediate.intermediate_act_fn,
            down=self.output.dense,
            down_dropout=self.output.dropout,
            norm2=self.output.LayerNorm,
            chunks=self.chunk_size_feed_forward,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        others = {"encoder_hidden_states": encoder_hidden_states, "past_key_values": past_key_values, **kwargs}
        out, attention_mask = self.promised(hidden_states, attention_mask, others)
        if out is not None:
            return out
        if not isinstance(getattr(getattr(self, "crossattention", None), "self", None), CrossAttention):
            (encoder_hidden_states,) = ordinary(encoder_hidden_states)
        hidden_states, attention_mask, encoder_attention_mask = ordinary(
            hidden_states, attention_mask, encoder_attention_mask
        )
        result: Tensor = super().forward(
            hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values, **kwargs
        )
        return result


class SelfAttention(Patched):
    """Self-attention without a T×T tensor, in layers that run as they stand."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        out = None
        if fresh_cache(past_key_values, self.layer_idx):
            out = self_attention(
                self,
                hidden_states,
                attention_mask,
                (self.query, self.key, self.value),
                dropout=self.dropout,
                cache=past_key_values,
                arguments=kwargs,
            )
        if out is None:
            return super().forward(hidden_states, attention_mask, past_key_values, **kwargs)
        return out, None


class CrossAttention(Patched):
    """Cross-attention without a T×T tensor, over the encoder states that are not padding."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if fills(past_key_values, self.layer_idx) and encoder_hidden_states is not None and hidden_states.dim() == 3:
            heads = (-1, self.attention_head_size)
            out = across(
                self,
                self.query(hidden_states).unflatten(-1, heads),
                encoder_hidden_states,
                lambda states: (self.key(states).unflatten(-1, heads), self.value(states).unflatten(-1, heads)),
                past_key_values,
                attention_mask,
                rowwise=all(why_unknown(part, nn.Linear) is None for part in (self.key, self.value)),
                scale=self.scaling,
                dropout_p=self.dropout.p if self.training else 0.0,
                arguments=kwargs,
            )
            if out is not None:
                return out.flatten(2), None
        return super().forward(hidden_states, encoder_hidden_states, attention_mask, past_key_values, **kwargs)


class DropoutAddNorm(Patched):
    """LayerNorm(dropout(x) + residual), in a module that holds both."""

    def in_one(self, x: Tensor) -> bool:
        """Whether that is one pass in this call, and notes it."""
        patch = self._fasttune
        why = why_unknown(self.dropout, nn.Dropout) or why_unknown(self.LayerNorm, nn.LayerNorm)
        why = why or why_replaced(stock_class(type(self)))
        if why is not None:
            patch.aside(why)
            return False
        if not patch.fused(x):
            return False
        patch.note()
        return True

    def normed(self, x: Tensor, residual: Tensor) -> Tensor:
        norm = self.LayerNorm
        return ops.dropout_add_layer_norm(
            x,
            residual,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            dropout_p=self.dropout.p if self.dropout.training else 0.0,
            backend=self._fasttune.backend,
        )


class DenseDropoutAddNorm(DropoutAddNorm):
    """LayerNorm(dropout(dense(x)) + residual): what ends attention and what ends the MLP."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if not self.in_one(hidden_states):
            return super().forward(hidden_states, input_tensor)
        return self.normed(self.dense(hidden_states), input_tensor)


class DenseActivation(Patched):
    """act(dense(x)), the bias added in the activation's pass."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        out = dense_activation(self, hidden_states, self.dense, self.intermediate_act_fn)
        return super().forward(hidden_states) if out is None else out


class DenseGeluNorm(Patched):
    """LayerNorm(GELU(dense(x))): the transform of a masked-language-model head."""

    activation_name = "transform_act_fn"

    def forward(self, hidden_states: Tensor) -> Tensor:
        function = self.activation_of()
        transformed = transform(self, hidden_states, self.dense, function, self.LayerNorm)
        return super().forward(hidden_states) if transformed is None else transformed

    def activation_of(self) -> Any:
        return getattr(self, self.activation_name)


def sum_of(embeddings: Any) -> Sum:
    return Sum(
        embeddings.word_embeddings,
        embeddings.LayerNorm,
        embeddings.dropout,
        embeddings.position_embeddings,
        embeddings.token_type_embeddings,
    )


class LookedUp(Patched):
    """dropout(LayerNorm(word + position + token type)), looked up, summed and normalised in one pass."""

    def positions(self, input_ids: Tensor, past: int) -> Tensor:
        """Position ids where the caller gave none, (1 or B, S)."""
        return self.position_ids[:, past : input_ids.shape[1] + past]

    def looked_up(
        self, input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None, past: int = 0
    ) -> Tensor | None:
        """None where the module has to run as it is."""

        def ids() -> tuple[Tensor, Tensor]:
            assert input_ids is not None
            positions = self.positions(input_ids, past) if position_ids is None else position_ids
            types = token_type_ids
            if types is None:
                types = self.token_type_ids.expand(positions.shape[0], -1).gather(1, positions)
            return positions, types

        return sum_norm_dropout(self, sum_of(self), input_ids, ids)


class SumNormDropout(LookedUp):
    """The embeddings of a model that may be a decoder."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        out = self.looked_up(input_ids, token_type_ids, position_ids, past_key_values_length)
        if out is None:
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length)
        return out


def bert_like(
    name: str,
    stock: ModuleType,
    classes: Mapping[str, type[nn.Module]],
    *,
    prefix: str,
    pooled: tuple[str, ...],
    of_every_token: tuple[str, ...],
    vocabulary: str,
    transform: str,
    transform_covers: tuple[str, ...] = ("LayerNorm", "transform_act_fn"),
    transform_unsuited: Callable[[Any], str | None] = lambda module: None,
) -> Family:
    """The family of a BERT-like model.

    stock: its module in Transformers. classes: the replacements by stock name, `<prefix>SelfOutput` and so on.
    pooled, of_every_token: its heads. vocabulary: the attribute name of the projection to the vocabulary. transform:
    the class before it.
    """

    def replace(stock_name: str, group: str, operation: str, does: str, **more: Any) -> Replacement:
        return Replacement(getattr(stock, stock_name), classes[stock_name], group, operation, does, **more)

    heads = {head: getattr(stock, head) for head in (*pooled, *of_every_token)}
    return Family(
        name=name,
        heads=tuple(heads.values()),
        of_every_token=tuple(heads[head] for head in of_every_token),
        replacements=(
            replace(
                f"{prefix}Embeddings",
                "embeddings",
                "embedding",
                "lookups + sum + LayerNorm + dropout",
                covers=("position_embeddings", "token_type_embeddings", "LayerNorm", "dropout"),
                unsuited=lambda module: why_no_sum(sum_of(module)),
            ),
            lookup("word_embeddings"),
            replace(
                f"{prefix}SelfAttention",
                "attention",
                "attention",
                "attention without a T×T tensor",
                covers=("dropout",),
            ),
            replace(
                f"{prefix}CrossAttention",
                "attention",
                "attention",
                "cross-attention without a T×T tensor",
                covers=("dropout",),
            ),
            *(
                replace(
                    f"{prefix}{part}",
                    "norms",
                    "dropout_add_layer_norm",
                    "dropout + residual + LayerNorm",
                    unsuited=lambda module: why_no_layer_norm(module.LayerNorm),
                    covers=("LayerNorm", "dropout"),
                )
                for part in ("SelfOutput", "Output")
            ),
            replace(
                f"{prefix}Intermediate",
                "mlp",
                "bias_activation",
                "bias + activation",
                covers=("intermediate_act_fn",),
                unsuited=why_no_activation("intermediate_act_fn"),
            ),
            replace(
                transform,
                "mlp",
                "gelu_layer_norm",
                "GELU + LayerNorm",
                covers=transform_covers,
                unsuited=transform_unsuited,
            ),
            replace(
                f"{prefix}Layer",
                "packing or trim",
                "",
                "padding left out, last layer for rows that are read",
                pays_in_torch=True,
            ),
            *common_leaves(vocabulary),
        ),
    )
