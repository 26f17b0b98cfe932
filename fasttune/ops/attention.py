"""Scaled dot-product attention that never writes a score matrix: dense or packed, causal or not, with dropout."""

from __future__ import annotations

import operator
import os
from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _backends, _cpp, _triton
from fasttune.ops._checks import (
    autocasts,
    check_device,
    check_floating,
    check_integer,
    check_number,
    check_shape,
    check_tensor,
    describe,
)
from fasttune.ops._cuda import attention as _cuda_attention
from fasttune.ops._operator import Operator
from fasttune.ops._random import check_probability, draw_seed
from fasttune.ops._reference.attention import attention as attention_reference
from fasttune.ops._reference.attention import attention_of_chosen_queries as attention_of_chosen_queries_reference

# Shape legend: B sequences, S queries and K keys of each, H heads, D head dimension; packed: T rows of N sequences.
# query, out (B, S, H, D), key, value (B, K, H, D), lse (B, H, S) float32; packed (T, H, D), lse (H, T).
# qkv (B, S, 3, H, D) or (T, 3, H, D); cu_seqlens (N + 1,); seed (1,). Queries of some positions only: R rows,
# query, out (R, H, D), lse (H, R), cu_seqlens_q (N + 1,), positions_q (R,) int32.

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 128  # of the kernels; other head sizes run on the torch backend

_NO_ROWS = (0, 0, 0, 0)
_LAST_POSITION = 2**31 - 1  # kernels hold positions in int32


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> tuple[int, ...]:
    """Address and strides of sequence, row and head of (B, S, H, D) or (T, H, D)."""
    strides = x.stride()
    return (x.data_ptr(), *strides[:3]) if len(strides) == 4 else (x.data_ptr(), 0, *strides[:2])


def _sizes(query: Tensor, key: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int, int]:
    """Sequences, queries, keys, heads, head dimension."""
    if cu_seqlens is None:
        sequences, queries, heads, head_dim = query.shape
        return sequences, queries, key.shape[1], heads, head_dim
    return cu_seqlens.shape[0] - 1, query.shape[0], query.shape[0], query.shape[1], query.shape[2]


def _empty_lse(query: Tensor) -> Tensor:
    shape = (*query.shape[:-3], query.shape[-2], query.shape[-3])
    return torch.empty(shape, dtype=torch.float32, device=query.device)


def check_offsets(
    cu_seqlens: Tensor, rows: int, max_seqlen: int | None, name: str = "cu_seqlens", *, operation: str = "attention"
) -> list[int]:
    """Values of cu_seqlens on CPU, before they are used as offsets. Returns the lengths, raises ValueError."""
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != rows:
        of = "query" if name == "cu_seqlens_q" else "key" if operation == "attention" else "input"
        raise ValueError(
            f"{operation}: {name} runs from {offsets[0]} to {offsets[-1]}; expected 0 to {rows}, the rows of {of}."
        )
    lengths = list(map(operator.sub, offsets[1:], offsets))
    if min(lengths, default=0) < 0:
        at = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(
            f"{operation}: {name} falls from {offsets[at]} to {offsets[at + 1]} at position {at + 1};"
            " expected offsets that never decrease."
        )
    if max_seqlen is not None and max(lengths, default=0) > max_seqlen:
        raise ValueError(
            f"attention: max_seqlen is {max_seqlen}, but cu_seqlens holds a sequence of length {max(lengths)}."
        )
    return lengths


def check_offsets_tensor(operation: str, cu_seqlens: Tensor, device: torch.device, like: str) -> None:
    """All of cu_seqlens but its values."""
    check_tensor(operation, "cu_seqlens", cu_seqlens, "a torch.Tensor of integers")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{operation}: cu_seqlens is {describe(cu_seqlens)}; expected int32 or int64.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{operation}: cu_seqlens is {describe(cu_seqlens)}; expected shape (N + 1,).")
    check_device(operation, "cu_seqlens", cu_seqlens, device, like)


def check_positions(positions_q: Tensor, cu_seqlens_q: Tensor | None) -> None:
    """Values of positions_q and cu_seqlens_q on CPU, before they are used. Raises ValueError."""
    assert cu_seqlens_q is not None
    check_offsets(cu_seqlens_q, positions_q.shape[0], None, "cu_seqlens_q")
    counts = cu_seqlens_q.diff()
    outside = (positions_q < 0) | (positions_q > _LAST_POSITION)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(
            f"attention: positions_q is {int(positions_q[at])} at row {at}; expected a position counted from 0, below"
            " 2 ** 31."
        )
    owner = torch.repeat_interleave(counts)
    falls = (positions_q.diff() < 0) & (owner.diff() == 0)
    if bool(falls.any()):
        at = int(falls.nonzero()[0]) + 1
        raise ValueError(
            f"attention: positions_q goes from {int(positions_q[at - 1])} to {int(positions_q[at])} at row {at};"
            " expected positions that never fall within a sequence."
        )


def _offsets(cu_seqlens: Tensor | None, cu_seqlens_q: Tensor | None, positions_q: Tensor | None) -> list[Tensor | None]:
    """As the library reads them: int64, int64, int32."""
    wide = [None if part is None else part.to(torch.int64).contiguous() for part in (cu_seqlens, cu_seqlens_q)]
    return [*wide, None if positions_q is None else positions_q.to(torch.int32).contiguous()]


def _cpp_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    cu_seqlens_q: Tensor | None = None,
    positions_q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    query, key, value = _unit_stride(query), _unit_stride(key), _unit_stride(value)
    if cu_seqlens is not None:
        check_offsets(cu_seqlens, key.shape[0], max_seqlen)
    if positions_q is not None:
        check_positions(positions_q, cu_seqlens_q)
    offsets = _offsets(cu_seqlens, cu_seqlens_q, positions_q)
    out = torch.empty(query.shape, dtype=query.dtype)
    lse = _empty_lse(query)
    _cpp.library.attention_forward(
        _cpp.DTYPE_CODES[query.dtype],
        _sizes(query, key, cu_seqlens),
        _rows(query),
        _rows(key),
        _rows(value),
        _rows(out),
        lse.data_ptr(),
        [_cpp.address(part) for part in offsets],
        causal,
        scale,
        _cpp.address(seed),
        dropout_p,
    )
    return out, lse


def _run_cpp_backward(
    dout: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    cu_seqlens_q: Tensor | None = None,
    positions_q: Tensor | None = None,
) -> None:
    query, key, value, out, lse = tensors
    query, key, value, dout = _unit_stride(query), _unit_stride(key), _unit_stride(value), _unit_stride(dout)
    offsets = _offsets(cu_seqlens, cu_seqlens_q, positions_q)
    _cpp.library.attention_backward(
        _cpp.DTYPE_CODES[query.dtype],
        _sizes(query, key, cu_seqlens),
        _rows(query),
        _rows(key),
        _rows(value),
        _rows(out),
        lse.data_ptr(),
        _rows(dout),
        *(_NO_ROWS if gradient is None else _rows(gradient) for gradient in gradients),
        [_cpp.address(part) for part in offsets],
        causal,
        scale,
        _cpp.address(seed),
        dropout_p,
    )


def _cpp_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    dquery, dkey, dvalue = _fake_backward(dout, query, key, value, needed)
    wanted = (dquery if needed[0] else None, dkey if needed[1] else None, dvalue if needed[2] else None)
    _run_cpp_backward(dout, (query, key, value, out, lse), wanted, cu_seqlens, seed, causal, scale, dropout_p)
    return dquery, dkey, dvalue


def _fake_backward(dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """A gradient that nobody needs is an empty tensor."""
    needed = rest[-1]
    return tuple(
        torch.empty(x.shape if need else (0,), dtype=x.dtype, device=x.device)
        for x, need in zip((query, key, value), needed, strict=True)
    )


def _fake_forward(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device), _empty_lse(query)


def _setup_context(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    *tensors, cu_seqlens, _, seed, causal, scale, dropout_p, backend = args
    ctx.save_for_backward(*tensors, *outputs, cu_seqlens, seed)
    ctx.options = (causal, scale, dropout_p)
    ctx.backend = backend


def _backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    needed = list(ctx.needs_input_grad[:3])
    gradients = _attention_backward(dout, *ctx.saved_tensors, *ctx.options, needed, ctx.backend)
    return (*(dx if need else None for dx, need in zip(gradients, needed, strict=True)), *(None,) * 6)


_attention_backward = Operator(
    "attention_backward",
    "(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor? cu_seqlens, Tensor? seed,"
    " bool causal, float scale, float dropout_p, bool[] needed) -> (Tensor, Tensor, Tensor)",
    {"cpp": _cpp_backward, "triton": _triton.lazy("attention", "backward"), "cuda": _cuda_attention.backward},
    _fake_backward,
    public=3,
)
_attention = Operator(
    "attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens, int? max_seqlen, Tensor? seed, bool causal,"
    " float scale, float dropout_p) -> (Tensor, Tensor)",
    {"cpp": _cpp_forward, "triton": _triton.lazy("attention", "forward"), "cuda": _cuda_attention.forward},
    _fake_forward,
    setup_context=_setup_context,
    backward=_backward,
)
_backends.declare("attention", *_attention.implementations)


def _cpp_packed_qkv_forward(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    query, key, value = qkv.unbind(-3)
    return _cpp_forward(query, key, value, *rest)


def _fake_packed_qkv_forward(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_forward(qkv.select(-3, 0))


def _cpp_packed_qkv_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> Tensor:
    gradient = torch.empty(qkv.shape, dtype=qkv.dtype)
    query, key, value = qkv.unbind(-3)
    dquery, dkey, dvalue = gradient.unbind(-3)
    tensors, gradients = (query, key, value, out, lse), (dquery, dkey, dvalue)
    _run_cpp_backward(dout, tensors, gradients, cu_seqlens, seed, causal, scale, dropout_p)
    return gradient


def _fake_packed_qkv_backward(dout: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _packed_qkv_backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    gradient = _attention_packed_qkv_backward(dout, *ctx.saved_tensors, *ctx.options, ctx.backend)
    return (gradient, *(None,) * 6)


_attention_packed_qkv_backward = Operator(
    "attention_packed_qkv_backward",
    "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor? cu_seqlens, Tensor? seed, bool causal, float scale,"
    " float dropout_p) -> Tensor",
    {
        "cpp": _cpp_packed_qkv_backward,
        "triton": _triton.lazy("attention", "packed_qkv_backward"),
        "cuda": _cuda_attention.packed_qkv_backward,
    },
    _fake_packed_qkv_backward,
)
_attention_packed_qkv = Operator(
    "attention_packed_qkv",
    "(Tensor qkv, Tensor? cu_seqlens, int? max_seqlen, Tensor? seed, bool causal, float scale, float dropout_p)"
    " -> (Tensor, Tensor)",
    {
        "cpp": _cpp_packed_qkv_forward,
        "triton": _triton.lazy("attention", "packed_qkv_forward"),
        "cuda": _cuda_attention.packed_qkv_forward,
    },
    _fake_packed_qkv_forward,
    setup_context=_setup_context,
    backward=_packed_qkv_backward,
)


def _cpp_chosen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    positions_q: Tensor,
    max_seqlen: int | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    return _cpp_forward(
        query, key, value, cu_seqlens, max_seqlen, seed, causal, scale, dropout_p, cu_seqlens_q, positions_q
    )


def _cpp_chosen_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    positions_q: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *options, needed = rest
    gradients = _fake_backward(dout, query, key, value, needed)
    wanted = tuple(dx if need else None for dx, need in zip(gradients, needed, strict=True))
    tensors = (query, key, value, out, lse)
    chosen = {"cu_seqlens_q": cu_seqlens_q, "positions_q": positions_q}
    _run_cpp_backward(dout, tensors, wanted, cu_seqlens, *options, **chosen)  # type: ignore[arg-type]
    return gradients


def _setup_chosen_context(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    *tensors, cu_seqlens, cu_seqlens_q, positions_q, _, seed, causal, scale, dropout_p, backend = args
    ctx.save_for_backward(*tensors, *outputs, cu_seqlens, cu_seqlens_q, positions_q, seed)
    ctx.options = (causal, scale, dropout_p)
    ctx.backend = backend


def _chosen_backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    needed = list(ctx.needs_input_grad[:3])
    gradients = _attention_chosen_backward(dout, *ctx.saved_tensors, *ctx.options, needed, ctx.backend)
    return (*(dx if need else None for dx, need in zip(gradients, needed, strict=True)), *(None,) * 8)


_attention_chosen_backward = Operator(
    "attention_chosen_queries_backward",
    "(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor cu_seqlens,"
    " Tensor cu_seqlens_q, Tensor positions_q, Tensor? seed, bool causal, float scale, float dropout_p,"
    " bool[] needed) -> (Tensor, Tensor, Tensor)",
    {
        "cpp": _cpp_chosen_backward,
        "triton": _triton.lazy("attention", "chosen_backward"),
        "cuda": _cuda_attention.chosen_backward,
    },
    _fake_backward,
    public=3,
)
_attention_chosen = Operator(
    "attention_chosen_queries",
    "(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, Tensor cu_seqlens_q, Tensor positions_q,"
    " int? max_seqlen, Tensor? seed, bool causal, float scale, float dropout_p) -> (Tensor, Tensor)",
    {
        "cpp": _cpp_chosen_forward,
        "triton": _triton.lazy("attention", "chosen_forward"),
        "cuda": _cuda_attention.chosen_forward,
    },
    _fake_forward,
    setup_context=_setup_chosen_context,
    backward=_chosen_backward,
)
_backends.declare("attention_chosen_queries", *_attention_chosen.implementations)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    positions_q: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale · query · keyᵀ) · value per sequence and head, without a score matrix in memory.

    query: (B, S, H, D), key and value: (B, K, H, D), float32, bfloat16 or float16 (float64 on the torch backend), any
        strides; only a last dimension whose stride is not 1 costs a copy. Packed: (T, H, D) each, with cu_seqlens.
    causal: query i sees keys j <= i + K - S: aligned at the last query and the last key.
    scale: factor of the scores; None means D ** -0.5.
    dropout_p: probability of dropping an attention weight, honoured to 2⁻¹⁶, by fasttune's shared generator at
        (position of the query, sequence · H + head, position of the key).
    cu_seqlens: int32 or int64 (N + 1,), first row of each sequence and T at the end: 0, ..., T. Sequences may be empty.
    max_seqlen: length of the longest packed sequence, if known; saves the torch backend from computing it.
    cu_seqlens_q, positions_q: queries of some positions only, against all keys. query is then (R, H, D); cu_seqlens_q
        (N + 1,) holds the first query of each sequence, positions_q int32 or int64 (R,) each query's position in its
        sequence, never falling, counted from 0. Such a row is what it would be among all: causal and dropout go by
        position. A query behind the last key (at padding, or of a sequence longer than its keys) sees all of them.
    backend: "cpp", "triton", "cuda", "torch" or None to choose. The kernels take head dimensions 16 to 128; None picks
        torch for others.

    Returns a contiguous tensor of query's shape. A query that sees no key gives 0 and passes no gradient. Backward
    recomputes the weights from the log-sum-exp of each row; memory beyond the gradients is O(S). Results do not depend
    on the number of threads. Sources: Vaswani et al. 2017; Milakov and Gimelshein 2018; Dao et al. 2022.

    Raises TypeError and ValueError for arguments that do not fit together, before any memory is touched, and
    RuntimeError for a backend that cannot run here.
    """
    check_floating("attention", "query", query)
    check_floating("attention", "key", key)
    check_floating("attention", "value", value)
    _check_layout("query", query, cu_seqlens, "(B, S, H, D)", "(T, H, D)", 4)
    shape = query.shape
    if (cu_seqlens_q is None) != (positions_q is None) or (positions_q is not None and cu_seqlens is None):
        raise ValueError(
            "attention: cu_seqlens_q and positions_q choose queries of packed sequences; expected both, with"
            " cu_seqlens, or neither."
        )
    if positions_q is not None:
        assert cu_seqlens_q is not None
        _check_chosen(query, cu_seqlens, cu_seqlens_q, positions_q)
        shape = torch.Size((key.shape[0], *shape[1:]))
    if key.shape != shape:
        expected = shape if cu_seqlens is not None else (shape[0], key.shape[1] if key.dim() == 4 else "K", *shape[2:])
        check_shape("attention", "key", key, expected, "batch, heads and head dimension like query")  # type: ignore[arg-type]
    if value.shape != key.shape:
        check_shape("attention", "value", value, key.shape, "like key")
    if query.dtype != key.dtype or query.dtype != value.dtype:
        query, key, value = _same_dtype(query, key, value)
    if key.device != query.device or value.device != query.device:
        check_device("attention", "key", key, query.device, "query")
        check_device("attention", "value", value, query.device, "query")
    operation = "attention" if positions_q is None else "attention_chosen_queries"
    scale, seed, chosen = _check_options(key, causal, scale, dropout_p, cu_seqlens, max_seqlen, backend, operation)
    if positions_q is not None:
        assert cu_seqlens is not None
        assert cu_seqlens_q is not None
        args = (query, key, value, cu_seqlens, cu_seqlens_q, positions_q, max_seqlen, seed, causal, scale, dropout_p)
        if chosen != "cpp" and query.device.type == "cpu" and not torch.compiler.is_compiling():
            check_positions(positions_q, cu_seqlens_q)
        if chosen != "torch":
            return _attention_chosen(*args, chosen)
        return attention_of_chosen_queries_reference(*args)
    if chosen == "torch":
        return attention_reference(query, key, value, cu_seqlens, max_seqlen, seed, causal, scale, dropout_p)
    return _attention(query, key, value, cu_seqlens, max_seqlen, seed, causal, scale, dropout_p, chosen)


def attention_packed_qkv(
    qkv: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`attention` of one tensor that holds query, key and value, with one gradient: no concatenation in backward.

    qkv: (B, S, 3, H, D), or packed (T, 3, H, D) with cu_seqlens. A projection's (B, S, 3·H·D) becomes it by `view`.
    The rest, the result (B, S, H, D) or (T, H, D) and the errors are those of `attention`.
    """
    check_floating("attention", "qkv", qkv)
    _check_layout("qkv", qkv, cu_seqlens, "(B, S, 3, H, D)", "(T, 3, H, D)", 5)
    if qkv.shape[-3] != 3:
        expected = (*qkv.shape[:-3], 3, *qkv.shape[-2:])
        check_shape("attention", "qkv", qkv, expected, "query, key and value in the third dimension from the end")
    query = qkv.select(-3, 0)
    scale, seed, chosen = _check_options(query, causal, scale, dropout_p, cu_seqlens, max_seqlen, backend)
    if chosen == "torch":
        query, key, value = qkv.unbind(-3)
        return attention_reference(query, key, value, cu_seqlens, max_seqlen, seed, causal, scale, dropout_p)
    return _attention_packed_qkv(qkv, cu_seqlens, max_seqlen, seed, causal, scale, dropout_p, chosen)


def _check_layout(
    name: str, x: Tensor, cu_seqlens: Tensor | None, dense: str, packed: str, dense_dimensions: int
) -> None:
    if cu_seqlens is None:
        if x.dim() != dense_dimensions:
            hint = f"; {packed} goes with cu_seqlens" if x.dim() == dense_dimensions - 1 else ""
            raise ValueError(f"attention: {name} is {describe(x)}; expected {dense}{hint}.")
    elif x.dim() != dense_dimensions - 1:
        raise ValueError(f"attention: {name} is {describe(x)}; expected {packed}, because cu_seqlens was given.")


def _check_chosen(query: Tensor, cu_seqlens: Tensor | None, cu_seqlens_q: Tensor, positions_q: Tensor) -> None:
    assert cu_seqlens is not None
    check_tensor("attention", "cu_seqlens", cu_seqlens, "a torch.Tensor of integers")
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("positions_q", positions_q)):
        check_tensor("attention", name, x, "a torch.Tensor of integers")
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"attention: {name} is {describe(x)}; expected int32 or int64.")
        check_device("attention", name, x, query.device, "query")
    check_shape("attention", "cu_seqlens_q", cu_seqlens_q, cu_seqlens.shape, "like cu_seqlens")
    check_shape("attention", "positions_q", positions_q, query.shape[:1], "one per query")


def _check_options(
    query: Tensor,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    backend: str | None,
    operation: str = "attention",
) -> tuple[float, Tensor | None, str]:
    """The scale, a seed if there is dropout, and the backend."""
    check_probability("attention", dropout_p)
    if scale is not None:
        check_number("attention", "scale", scale)
    if cu_seqlens is not None:
        if max_seqlen is not None:
            check_integer("attention", "max_seqlen", max_seqlen)
        check_offsets_tensor("attention", cu_seqlens, query.device, "query")
    elif max_seqlen is not None:
        raise ValueError(f"attention: max_seqlen is {max_seqlen} without cu_seqlens; it describes packed sequences.")
    head_dim = query.shape[-1]
    chosen = _backends.choose(operation, query, backend)
    if chosen != "torch" and not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        if (backend or os.environ.get("FASTTUNE_BACKEND") or "auto") != "auto":
            raise ValueError(
                f"attention: the head dimension is {head_dim}; the {chosen} backend takes {MIN_HEAD_DIM} to"
                f" {MAX_HEAD_DIM}. Leave backend at None or ask for 'torch'."
            )
        chosen = "torch"
    if (
        chosen != "cpp"  # which checks in its own time
        and cu_seqlens is not None
        and cu_seqlens.device.type == "cpu"
        and not torch.compiler.is_compiling()
    ):
        check_offsets(cu_seqlens, query.shape[0], max_seqlen)
    if scale is None:
        scale = head_dim**-0.5 if head_dim else 1.0
    return float(scale), (draw_seed(query.device) if dropout_p > 0.0 else None), chosen


def _same_dtype(*tensors: Tensor) -> list[Tensor]:
    """Under autocast the tensors in its dtype; otherwise a mixture is a mistake."""
    device = tensors[0].device
    if autocasts(device):
        dtype = torch.get_autocast_dtype(device.type)
        return [tensor.to(dtype) for tensor in tensors]
    dtypes = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    raise TypeError(f"attention: query, key and value are {dtypes}; expected one dtype.")
