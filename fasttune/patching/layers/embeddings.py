"""A model's first module, as BERT has it: dropout(LayerNorm(word + position + token type)), looked up, summed and
normalised in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttune import ops
from fasttune.patching.layers.leaves import why_no_embedding, why_no_norm_of_embeddings
from fasttune.patching.layers.patched import Patched
from fasttune.patching.layers.tied import lookup_view
from fasttune.patching.premises.known import stock_class, why_replaced, why_unknown


class Sum(NamedTuple):
    """The modules of dropout(norm(word + position + token type)); position, token_type: None where there is none."""

    word: Any
    norm: Any
    dropout: Any
    position: Any = None
    token_type: Any = None


def why_no_sum(parts: Sum) -> str | None:
    """Why `ops.embedding` cannot stand in for these modules: the tables, the LayerNorm."""
    why = why_no_norm_of_embeddings(parts.norm)
    for table in (parts.word, parts.position, parts.token_type):
        why = why or (None if table is None else why_no_embedding(table))
    return why


def sum_norm_dropout(
    module: Any,
    parts: Sum,
    input_ids: Tensor | None,
    ids: Callable[[], tuple[Tensor | None, Tensor | None]] = lambda: (None, None),
) -> Tensor | None:
    """What the module gives for input_ids (B, S), (B, S, E); None where it has to run as it is.

    ids: gives positions and token types, (1 or B, S) each; None for those of which there is no table."""
    patch, word, norm = module._fasttune, parts.word, parts.norm
    why = "inputs_embeds" if input_ids is None else None
    for table in (word, parts.position, parts.token_type):
        why = why or (None if table is None else why_unknown(table, nn.Embedding))
    why = why or why_unknown(norm, nn.LayerNorm) or why_unknown(parts.dropout, nn.Dropout) or why_no_sum(parts)
    why = why or why_replaced(stock_class(type(module)))
    if why is not None or not patch.fused(word.weight):
        if why is not None:
            patch.aside(why)
        return None
    assert input_ids is not None
    patch.note()
    position_ids, token_type_ids = ids()
    others: dict[str, Tensor] = {}
    for name, table, of in (
        ("position", parts.position, position_ids),
        ("token_type", parts.token_type, token_type_ids),
    ):
        if of is not None:
            others[f"{name}_ids"] = of.expand(input_ids.shape)
            others[f"{name}_weight"] = without_gradient_of_row(table.weight, table.padding_idx)
    tied = lookup_view(word) if isinstance(word, Patched) else None
    out = ops.embedding(
        input_ids,
        word.weight if tied is None else tied[1],
        **others,
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        eps=norm.eps,
        dropout_p=parts.dropout.p if parts.dropout.training else 0.0,
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
