"""What RoBERTa, XLM-RoBERTa and CamemBERT add to BERT: positions count from padding_idx + 1 and skip padding, and the
language-model head is one module."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers import activations

from fasttune.patching.families import _bert_like as shared
from fasttune.patching.families.spec import Family
from fasttune.patching.layers.leaves import why_no_layer_norm
from fasttune.patching.layers.mlp import transform
from fasttune.patching.layers.patched import Patched


class SumNormDropout(shared.SumNormDropout):
    def positions(self, input_ids: Tensor, past: int) -> Tensor:
        result: Tensor = self.create_position_ids_from_input_ids(input_ids, self.padding_idx, past)
        return result


class LMHead(Patched):
    """decoder(LayerNorm(GELU(dense(x)))); the GELU is a module-level activation of Transformers."""

    def forward(self, features: Tensor, **kwargs: Any) -> Tensor:
        transformed = transform(self, features, self.dense, activations.gelu, self.layer_norm)
        if transformed is None:
            return super().forward(features, **kwargs)
        return self.decoder(transformed)


def roberta_like(name: str, stock: ModuleType, classes: dict[str, type[nn.Module]], *, prefix: str) -> Family:
    return shared.bert_like(
        name,
        stock,
        classes,
        prefix=prefix,
        vocabulary="decoder",
        transform=f"{prefix}LMHead",
        transform_covers=("layer_norm",),
        transform_unsuited=lambda module: why_no_layer_norm(module.layer_norm),
        pooled=(f"{prefix}Model", f"{prefix}ForSequenceClassification", f"{prefix}ForMultipleChoice"),
        of_every_token=tuple(
            f"{prefix}For{head}" for head in ("MaskedLM", "CausalLM", "TokenClassification", "QuestionAnswering")
        ),
    )
