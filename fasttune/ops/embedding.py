"""Embedding sums: word + token type + position in one pass, then LayerNorm and dropout as BERT has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _backends, _cpp, _transforms, _triton
from fasttune.ops._checks import check_device, check_floating, check_integer, describe
from fasttune.ops._indices import check_integers, check_range
from fasttune.ops._operator import Operator
from fasttune.ops._reference.embedding import embedding_sum as embedding_sum_reference
from fasttune.ops.dropout import dropout
from fasttune.ops.layer_norm import layer_norm

# Shape legend: ids (...) int64, R rows in all; tables (size, C); out (..., C).


def _cpp_sum(
    word_ids: Tensor,
    word: Tensor,
    type_ids: Tensor | None,
    token_type: Tensor | None,
    position_ids: Tensor | None,
    position: Tensor | None,
    padding_idx: int | None,
    sparse: bool,
) -> Tensor:
    ids = [None if i is None else i.contiguous() for i in (word_ids, type_ids, position_ids)]
    tables = [None if t is None else t.contiguous() for t in (word, token_type, position)]
    for name, i, t in zip(("input_ids", "token_type_ids", "position_ids"), ids, tables, strict=True):
        if i is not None and t is not None:
            check_range("embedding", name, i, t.shape[0])
    out = torch.empty((*word_ids.shape, word.shape[1]), dtype=word.dtype, device=word.device)
    pairs = [_cpp.address(x) for pair in zip(ids, tables, strict=True) for x in pair]
    _cpp.library.embedding_sum(_cpp.DTYPE_CODES[word.dtype], word_ids.numel(), word.shape[1], *pairs, out.data_ptr())
    return out


def _fake_sum(word_ids: Tensor, word: Tensor, *rest: Any) -> Tensor:
    return torch.empty((*word_ids.shape, word.shape[1]), dtype=word.dtype, device=word.device)


def _groups(ids: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(distinct ids ascending, order, offsets): rows order[offsets[g] : offsets[g + 1]] carry the g-th id."""
    ordered, order = ids.reshape(-1).sort(stable=True)
    distinct, counts = ordered.unique_consecutive(return_counts=True)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    if padding_idx is not None:  # its row gets no gradient
        place = int(torch.searchsorted(distinct, padding_idx))
        if place < distinct.numel() and int(distinct[place]) == padding_idx:
            first, count = int(offsets[place]), int(counts[place])
            order = torch.cat((order[:first], order[first + count :]))
            distinct = torch.cat((distinct[:place], distinct[place + 1 :]))
            offsets = torch.cat((offsets[:place], offsets[place + 1 :] - count))
    return distinct, order, offsets


def _sum_groups(dout: Tensor, groups: tuple[Tensor, Tensor, Tensor], targets: Tensor, gradient: Tensor) -> None:
    distinct, order, offsets = groups
    _cpp.library.embedding_gradient(
        _cpp.DTYPE_CODES[dout.dtype],
        distinct.numel(),
        dout.shape[-1],
        order.data_ptr(),
        offsets.data_ptr(),
        targets.data_ptr(),
        dout.data_ptr(),
        gradient.data_ptr(),
    )


def _cpp_gradient(dout: Tensor, ids: Tensor, size: int, padding_idx: int | None) -> Tensor:
    gradient = _cpp.empty_large((size, dout.shape[-1]), dout.dtype).zero_()
    groups = _groups(ids, padding_idx)
    _sum_groups(dout.contiguous(), groups, groups[0], gradient)
    return gradient


def _fake_gradient(dout: Tensor, ids: Tensor, size: int, padding_idx: int | None) -> Tensor:
    return torch.empty((size, dout.shape[-1]), dtype=dout.dtype, device=dout.device)


def _cpp_sparse_gradient(dout: Tensor, ids: Tensor, size: int, padding_idx: int | None) -> Tensor:
    """The same as a coalesced sparse tensor (size, C): the rows that occur, and nothing for the rest."""
    groups = _groups(ids, padding_idx)
    values = torch.empty((groups[0].numel(), dout.shape[-1]), dtype=dout.dtype)
    _sum_groups(dout.contiguous(), groups, torch.arange(groups[0].numel()), values)
    with torch.sparse.check_sparse_tensor_invariants(False):
        return torch.sparse_coo_tensor(groups[0][None], values, (size, dout.shape[-1]), is_coalesced=True)


def _setup_context(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
    word_ids, word, type_ids, token_type, position_ids, position, ctx.padding_idx, ctx.sparse, ctx.backend = args
    ctx.save_for_backward(word_ids, type_ids, position_ids)
    ctx.sizes = tuple(None if table is None else table.shape[0] for table in (word, token_type, position))


def _backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    gradients: list[Tensor | None] = []
    for i, (ids, size) in enumerate(zip(ctx.saved_tensors, ctx.sizes, strict=True)):
        padding_idx = ctx.padding_idx if i == 0 else None
        if not ctx.needs_input_grad[2 * i + 1]:
            gradients += (None, None)
        elif i == 0 and ctx.sparse and torch.is_grad_enabled():
            # A graph of the gradient goes through the operator, which refuses to be differentiated.
            gradients += (None, _embedding_gradient(dout, ids, size, padding_idx, ctx.backend).to_sparse(1))
        elif i == 0 and ctx.sparse:
            gradients += (None, _sparse_gradient[ctx.backend](dout, ids, size, padding_idx))
        else:
            gradients += (None, _embedding_gradient(dout, ids, size, padding_idx, ctx.backend))
    return (*gradients, None, None)


_sparse_gradient = {
    "cpp": _cpp_sparse_gradient,
    "triton": _triton.lazy("embedding", "embedding_sparse_gradient"),
}
_embedding_gradient = Operator(
    "embedding_gradient",
    "(Tensor dout, Tensor ids, int size, int? padding_idx) -> Tensor",
    {"cpp": _cpp_gradient, "triton": _triton.lazy("embedding", "embedding_gradient")},
    _fake_gradient,
)
_embedding_sum = Operator(
    "embedding_sum",
    "(Tensor word_ids, Tensor word, Tensor? type_ids, Tensor? token_type, Tensor? position_ids, Tensor? position,"
    " int? padding_idx, bool sparse) -> Tensor",
    {"cpp": _cpp_sum, "triton": _triton.lazy("embedding", "embedding_sum")},
    _fake_sum,
    setup_context=_setup_context,
    backward=_backward,
)
_backends.declare("embedding", *_embedding_sum.implementations)


def embedding(
    input_ids: Tensor,
    word_weight: Tensor,
    *,
    position_ids: Tensor | None = None,
    position_weight: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    token_type_weight: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    padding_idx: int | None = None,
    sparse_grad: bool = False,
    row_ids: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """dropout(LayerNorm(word[input_ids] + token_type[token_type_ids] + position[position_ids])).

    input_ids: integers (...); word_weight: (V, C), float32, bfloat16 or float16 (float64 on the torch backend).
    position_ids with position_weight (P, C), token_type_ids with token_type_weight (Y, C): integers that broadcast to
        input_ids' shape; either pair may be left out.
    norm_weight, norm_bias: (C,), eps: a LayerNorm of the sum, left out if both are None.
    dropout_p: of the result, by the shared generator; row_ids: as in `dropout`.
    padding_idx: this row of word_weight gets gradient 0, as in torch.nn.Embedding; negative counts from the end.
    sparse_grad: word_weight's gradient is a coalesced sparse tensor that holds the rows that occur; on a GPU their
        number is read back.
    backend: "cpp", "triton", "torch" or None to choose.

    Returns (..., C). Backward is deterministic: each gradient row is summed in float32 in the order of the rows and
    written once. LayerNorm and dropout are passes of their own: for BERT-base at 16 × 128 tokens they move 25 MB in a
    step that moves gigabytes, which fusing them here would not repay.

    Raises TypeError and ValueError for arguments that do not fit together and, on a CPU, IndexError with the position
    of an id that is out of range, before any memory is touched.
    """
    check_floating("embedding", "word_weight", word_weight)
    if word_weight.dim() != 2:
        raise ValueError(f"embedding: word_weight is {describe(word_weight)}; expected shape (V, C).")
    word_ids = _ids("input_ids", input_ids, input_ids, word_weight)
    position_ids = _pair("position", position_ids, position_weight, input_ids, word_weight)
    token_type_ids = _pair("token_type", token_type_ids, token_type_weight, input_ids, word_weight)
    if padding_idx is not None:
        check_integer("embedding", "padding_idx", padding_idx)
        size = word_weight.shape[0]
        if not -size <= padding_idx < size:
            raise ValueError(f"embedding: padding_idx is {padding_idx}; expected a row of word_weight, {size} in all.")
        padding_idx %= size
    chosen = _backends.choose("embedding", word_weight, backend)
    if sparse_grad and _transforms.transformed():
        sparse_grad = False  # torch.func has no sparse tensors
    args = (
        *(word_ids, word_weight, token_type_ids, token_type_weight, position_ids, position_weight),
        *(padding_idx, sparse_grad),
    )
    out: Tensor = embedding_sum_reference(*args) if chosen == "torch" else _embedding_sum(*args, chosen)
    if norm_weight is not None or norm_bias is not None:
        out = layer_norm(out, norm_weight, norm_bias, eps=eps, backend=chosen)
    return dropout(out, dropout_p=dropout_p, row_ids=row_ids, backend=chosen) if dropout_p else out


def _ids(name: str, ids: Tensor, input_ids: Tensor, word_weight: Tensor) -> Tensor:
    check_integers("embedding", name, ids)
    check_device("embedding", name, ids, word_weight.device, "word_weight")
    if ids.shape != input_ids.shape:
        try:
            ids = ids.expand(input_ids.shape)
        except RuntimeError:
            raise ValueError(
                f"embedding: {name} is {describe(ids)}; expected a shape that broadcasts to {tuple(input_ids.shape)},"
                " like input_ids."
            ) from None
    return ids if ids.dtype == torch.int64 else ids.long()


def _pair(
    name: str, ids: Tensor | None, weight: Tensor | None, input_ids: Tensor, word_weight: Tensor
) -> Tensor | None:
    if (ids is None) != (weight is None):
        given, missing = ("ids", "weight") if weight is None else ("weight", "ids")
        raise ValueError(f"embedding: {name}_{given} came without {name}_{missing}; expected both or neither.")
    if ids is None or weight is None:
        return None
    check_floating("embedding", f"{name}_weight", weight)
    check_device("embedding", f"{name}_weight", weight, word_weight.device, "word_weight")
    if weight.dim() != 2 or weight.shape[1] != word_weight.shape[1] or weight.dtype != word_weight.dtype:
        raise ValueError(
            f"embedding: {name}_weight is {describe(weight)}; expected (rows, {word_weight.shape[1]}) of"
            f" {word_weight.dtype}, like word_weight."
        )
    return _ids(f"{name}_ids", ids, input_ids, word_weight)
