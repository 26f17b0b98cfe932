"""The rules for torch's own modules, which every family holds."""

from __future__ import annotations

from torch import nn

from fasttune.patching.families.spec import Replacement
from fasttune.patching.layers.leaves import Dropout, Embedding, LayerNorm, Linear, why_no_embedding, why_no_layer_norm


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
