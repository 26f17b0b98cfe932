"""What ModernBERT and its decoder share: all but the projections of attention."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from fasttune.patching.families._leaves import common_leaves, lookup
from fasttune.patching.families.spec import Family, Replacement
from fasttune.patching.layers.captured import Parts
from fasttune.patching.layers.embeddings import Sum, sum_norm_dropout, why_no_sum
from fasttune.patching.layers.frozen import Unknown
from fasttune.patching.layers.leaves import why_no_layer_norm
from fasttune.patching.layers.mlp import gated_activation, transform, why_no_activation, why_no_gelu
from fasttune.patching.layers.patched import Patched
from fasttune.patching.layers.pre_norm import PreNorm
from fasttune.patching.layers.projections import Fused, Separate
from fasttune.patching.layers.promised import PromisedLayer


def sum_of(embeddings: Any) -> Sum:
    return Sum(embeddings.tok_embeddings, embeddings.norm, embeddings.drop)


class Embeddings(Patched):
    def forward(self, input_ids: Any = None, inputs_embeds: Tensor | None = None) -> Tensor:
        out = None if inputs_embeds is not None else sum_norm_dropout(self, sum_of(self), input_ids)
        return super().forward(input_ids, inputs_embeds) if out is None else out


class Layer(PromisedLayer):
    captured = PreNorm

    def attends(self) -> Any:
        return self.attn if hasattr(self.attn, "sliding_window") else None

    def heads(self, attention: Any) -> tuple[int, int]:
        return attention.config.num_attention_heads, attention.head_dim

    def window(self) -> int | None:
        return window_of(self.attn)

    def parts_around(self, project: Fused | Separate, scale: float, attention: type, mlp: type) -> Parts:
        """attention, mlp: the classes that these modules must be of."""
        attn = self.attn
        return Parts(
            inside=((attn, attention), (self.mlp, mlp)),
            attend=attn,
            project=project,
            scale=scale,
            attention_dropout=attn.attention_dropout,
            out=attn.Wo,
            out_dropout=attn.out_drop,
            norm1=self.attn_norm,
            up=self.mlp.Wi,
            act=self.mlp.act,
            gated=True,
            gate_dropout=self.mlp.drop,
            down=self.mlp.Wo,
            down_dropout=None,
            norm2=self.mlp_norm,
        )


def window_of(attention: Any) -> int | None:
    """Stock counts a token itself in."""
    return None if attention.sliding_window is None else attention.sliding_window - 1


class MLP(Patched):
    def forward(self, hidden_states: Tensor) -> Tensor:
        middle = gated_activation(self, hidden_states, self.Wi, self.act)
        return super().forward(hidden_states) if middle is None else self.Wo(self.drop(middle))


class PredictionHead(Patched):
    def forward(self, hidden_states: Tensor) -> Tensor:
        transformed = transform(self, hidden_states, self.dense, self.act, self.norm)
        return super().forward(hidden_states) if transformed is None else transformed


def why_turned_otherwise(stock: ModuleType, shipped: Any) -> str | None:
    if stock.apply_rotary_pos_emb is shipped:
        return None
    return "apply_rotary_pos_emb was replaced for the whole process"


def check_turn(stock: ModuleType, shipped: Any) -> None:
    why = why_turned_otherwise(stock, shipped)
    if why is not None:
        raise Unknown(why)


def modernbert_like(
    name: str,
    stock: ModuleType,
    classes: Mapping[str, type[nn.Module]],
    *,
    prefix: str,
    layer: str,
    pooled: tuple[str, ...],
    of_every_token: tuple[str, ...],
) -> Family:
    """classes: the replacements by stock name, `<prefix>MLP` and so on. layer: the name of the layer's class. pooled,
    of_every_token: the heads."""

    def replace(suffix: str, group: str, operation: str, does: str, **more: Any) -> Replacement:
        return Replacement(getattr(stock, prefix + suffix), classes[prefix + suffix], group, operation, does, **more)

    heads = {head: getattr(stock, prefix + head) for head in (*pooled, *of_every_token)}
    return Family(
        name=name,
        heads=tuple(heads.values()),
        of_every_token=tuple(heads[head] for head in of_every_token),
        replacements=(
            replace(
                "Embeddings",
                "embeddings",
                "embedding",
                "lookup + LayerNorm + dropout",
                covers=("norm", "drop"),
                unsuited=lambda module: why_no_sum(sum_of(module)),
            ),
            lookup("tok_embeddings"),
            replace("Attention", "attention", "attention", "attention without a T×T tensor"),
            replace(
                "MLP",
                "mlp",
                "gated_activation",
                "gated activation",
                covers=("act",),
                unsuited=why_no_activation("act"),
            ),
            replace(
                "PredictionHead",
                "mlp",
                "gelu_layer_norm",
                "GELU + LayerNorm",
                covers=("norm", "act"),
                unsuited=lambda module: why_no_layer_norm(module.norm) or why_no_gelu("act")(module),
            ),
            replace(
                layer,
                "packing or trim",
                "",
                "padding left out, last layer for rows that are read",
                pays_in_torch=True,
            ),
            *common_leaves("decoder"),
        ),
    )
