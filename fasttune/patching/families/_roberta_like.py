"""What RoBERTa, XLM-RoBERTa and CamemBERT add to BERT: positions count from padding_idx + 1 and skip padding, and the
language-model head is one module."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers import activations

from fasttune.patching.families import _bert_like as shared
from fasttune.patching.families._activations import gelu_kind
from fasttune.patching.layers import LAYER_NORMS, Patched, why_no_layer_norm
from fasttune.patching.plain import why_not_plain
from fasttune.patching.rows import all_rows, first_row, for_the_caller, labelled, labelled_next, labelled_tokens
from fasttune.patching.spec import Family


class SumNormDropout(shared.SumNormDropout):
    def positions(self, input_ids: Tensor, past: int) -> Tensor:
        result: Tensor = self.create_position_ids_from_input_ids(input_ids, self.padding_idx, past)
        return result


class LMHead(Patched):
    """decoder(LayerNorm(GELU(dense(x)))); the GELU is a module-level activation of Transformers."""

    def forward(self, features: Tensor, **kwargs: Any) -> Tensor:
        why = why_not_plain(self.layer_norm, *LAYER_NORMS)
        if why is not None or not gelu_kind(activations.gelu) or not self._fasttune.fused(self.dense.weight):
            if why is not None:
                self._fasttune.aside(why)
            return super().forward(features, **kwargs)
        return self.decoder(shared.few_rows(self, features, LMHead.transformed, self.layer_norm))

    def transformed(self, features: Tensor) -> Tensor:
        kind = gelu_kind(activations.gelu) or "none"
        return shared.gelu_then_norm(self.dense(features), self.layer_norm, kind, self._fasttune.backend)


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
        heads={
            f"{prefix}Model": for_the_caller,
            f"{prefix}ForMaskedLM": labelled,
            f"{prefix}ForCausalLM": labelled_next,
            f"{prefix}ForSequenceClassification": first_row,
            f"{prefix}ForMultipleChoice": first_row,
            f"{prefix}ForTokenClassification": labelled_tokens,
            f"{prefix}ForQuestionAnswering": all_rows,
        },
    )
