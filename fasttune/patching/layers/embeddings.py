"""A model's first module, as BERT has it: dropout(LayerNorm(word + position + token type)), looked up, summed and
normalised in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fasttune import ops
from fasttune.patching.layers.leaves import why_no_embedding, why_no_layer_norm
from fasttune.patching.layers.patched import Patched
from fasttune.patching.layers.tied import lookup_view
from fasttune.patching.premises.known import stock_class, why_replaced, why_unknown


def _tables(module: Any) -> tuple[Any, ...]:
    """The lookup tables beside the words'."""
    names = ("position_embeddings", "token_type_embeddings")
    return tuple(table for name in names if (table := getattr(module, name, None)) is not None)


def why_no_sum(module: Any) -> str | None:
    """Why `ops.embedding` cannot stand in for such a module: its tables, its LayerNorm."""
    why = why_no_layer_norm(module.LayerNorm)
    for table in (module.word_embeddings, *_tables(module)):
        why = why or why_no_embedding(table)
    return why


def sum_norm_dropout(
    module: Any, input_ids: Tensor | None, ids: Callable[[], tuple[Tensor, Tensor | None]]
) -> Tensor | None:
    """What the module gives for input_ids (B, S), (B, S, E); None where it has to run as it is.

    ids: gives positions and token types, (1 or B, S) each; None for the types of a model that has none."""
    patch, norm, word = module._fasttune, module.LayerNorm, module.word_embeddings
    why = "inputs_embeds" if input_ids is None else None
    for table in (word, *_tables(module)):
        why = why or why_unknown(table, nn.Embedding)
    why = why or why_unknown(norm, nn.LayerNorm) or why_unknown(module.dropout, nn.Dropout) or why_no_sum(module)
    why = why or why_replaced(stock_class(type(module)))
    if why is not None or not patch.fused(word.weight):
        if why is not None:
            patch.aside(why)
        return None
    assert input_ids is not None
    patch.note()
    position_ids, token_type_ids = ids()
    position = module.position_embeddings
    types: dict[str, Tensor] = {}
    if token_type_ids is not None:
        token_type = module.token_type_embeddings
        types["token_type_ids"] = token_type_ids.expand(input_ids.shape)
        types["token_type_weight"] = without_gradient_of_row(token_type.weight, token_type.padding_idx)
    tied = lookup_view(word) if isinstance(word, Patched) else None
    out = ops.embedding(
        input_ids,
        word.weight if tied is None else tied[1],
        position_ids=position_ids.expand(input_ids.shape),
        position_weight=without_gradient_of_row(position.weight, position.padding_idx),
        **types,
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        eps=norm.eps,
        dropout_p=module.dropout.p if module.dropout.training else 0.0,
        padding_idx=word.padding_idx,
        sparse_grad=tied is not None,
        backend=patch.backend,
    )
    if tied is not None:
        out._fasttune_tied = (tied[0], tied[2])  # type: ignore[attr-defined]
    return out


class _WithoutGradientOfRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, row: int) -> Tensor:
        ctx.row = row
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone()
        grad[ctx.row] = 0
        return grad, None


def without_gradient_of_row(weight: Tensor, row: int | None) -> Tensor:
    """The same weight; its row `row` gets no gradient (an Embedding's padding_idx). For small tables: it copies."""
    if row is None:
        return weight
    result: Tensor = _WithoutGradientOfRow.apply(weight, row)
    return result
