"""The rules that families share: for torch's own modules, and for the parts that each has under a name of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from fasttune.patching.families.spec import Replacement
from fasttune.patching.layers.leaves import Dropout, Embedding, LayerNorm, Linear, why_no_embedding, why_no_layer_norm
from fasttune.patching.layers.mlp import why_no_activation


def common_leaves(*heads: str) -> tuple[Replacement, ...]:
    """torch's own modules, wherever a family holds them. heads: the names of projections of which few rows are read."""
    return (
        Replacement(
            nn.Linear,
            Linear,
            "loss",
            "linear_cross_entropy",
            "logits on demand, loss without them",
            only=heads,
            pays_in_torch=True,
        ),
        Replacement(nn.LayerNorm, LayerNorm, "norms", "layer_norm", "LayerNorm", unsuited=why_no_layer_norm),
        Replacement(nn.Dropout, Dropout, "norms", "dropout", "dropout"),
    )


def lookup(*names: str) -> Replacement:
    """The tables of tokens, where nothing else looks them up. names: of the attributes that hold them."""
    return Replacement(
        nn.Embedding,
        Embedding,
        "embeddings",
        "embedding",
        "lookup with a deterministic gradient",
        only=names,
        unsuited=why_no_embedding,
    )


def whole_layer(stock: type[nn.Module], by: type[nn.Module], **more: Any) -> Replacement:
    """more: of `Replacement`."""
    does = "padding left out, last layer for rows that are read"
    return Replacement(stock, by, "packing or trim", "", does, pays_in_torch=True, **more)


def dropout_add_norm(stock: type[nn.Module], by: type[nn.Module]) -> Replacement:
    """Of a module with `dropout` and `LayerNorm`."""
    return Replacement(
        stock,
        by,
        "norms",
        "dropout_add_layer_norm",
        "dropout + residual + LayerNorm",
        covers=("LayerNorm", "dropout"),
        unsuited=lambda module: why_no_layer_norm(module.LayerNorm),
    )


def bias_activation(stock: type[nn.Module], by: type[nn.Module], name: str) -> Replacement:
    """name: of the attribute that holds the activation."""
    does, unsuited = "bias + activation", why_no_activation(name)
    return Replacement(stock, by, "mlp", "bias_activation", does, covers=(name,), unsuited=unsuited)
