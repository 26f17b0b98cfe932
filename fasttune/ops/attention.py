"""Scaled dot-product attention that never writes a score matrix: dense or packed, with masks and dropout."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _attention_cpp, _backends, _triton
from fasttune.ops._attention_call import LEARNED, SCHEMA, TENSORS, Call
from fasttune.ops._attention_checks import (
    check_chosen,
    check_layout,
    check_offsets,
    check_offsets_tensor,
    check_positions,
    check_terms,
    check_window,
)
from fasttune.ops._checks import autocasts, check_device, check_floating, check_integer, check_number, check_shape
from fasttune.ops._cuda import attention as _attention_cuda
from fasttune.ops._operator import Operator
from fasttune.ops._random import check_probability, draw_seed
from fasttune.ops._reference.attention import attention as attention_reference

# Shape legend: B sequences, S queries and K keys of each, H heads, D head dimension; packed: T rows of N sequences.
# query, out (B, S, H, D), key, value (B, K, H, D), lse (B, H, S) float32; packed (T, H, D), lse (H, T).
# qkv (B, S, 3, H, D) or (T, 3, H, D); cu_seqlens (N + 1,); seed (1,). Queries of some positions only: R rows,
# query, out (R, H, D), lse (H, R), cu_seqlens_q (N + 1,), positions_q (R,) int32. bias (H, 2 R + 1); c2p like query and
# p2c like key, with W buckets for D; buckets (2 R + 1,).

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 128  # of the kernels; other head sizes run on the torch backend

Tensors = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # of query, key, value, bias, c2p, p2c


def _parts(query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensors:
    """query, key and value, which may lie in one tensor, given as query alone."""
    if key is None or value is None:
        return query.unbind(-3)  # type: ignore[return-value]
    return query, key, value


def _forward_of(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operator's implementation of a backend's run(query, key, value, call) -> (out, lse)."""

    def forward(query: Tensor, key: Tensor | None, value: Tensor | None, *call: Any) -> tuple[Tensor, Tensor]:
        return run(*_parts(query, key, value), Call(*call))

    return forward


def _backward_of(run: Callable[..., None]) -> Callable[..., Gradients]:
    """The same of run(dout, (query, key, value, out, lse), gradients, call), which fills the gradients, in any strides,
    that are not None: of query, key, value, bias, c2p and p2c."""

    def backward(
        dout: Tensor, query: Tensor, key: Tensor | None, value: Tensor | None, out: Tensor, lse: Tensor, *rest: Any
    ) -> Gradients:
        *call, needed = rest
        gradients = _fake_backward(dout, query, key, value, out, lse, *rest)
        there = (query, key, value, *(call[place] for place in LEARNED))
        wanted: list[Any] = [
            gradient if need and x is not None else None
            for gradient, need, x in zip(gradients, needed, there, strict=True)
        ]
        if key is None:
            wanted[:3] = gradients[0].unbind(-3)
        run(dout, (*_parts(query, key, value), out, lse), wanted, Call(*call))
        return gradients

    return backward


def _fake_forward(query: Tensor, key: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = query.shape if key is not None else (*query.shape[:-3], *query.shape[-2:])
    out = torch.empty(shape, dtype=query.dtype, device=query.device)
    return out, torch.empty((*shape[:-3], shape[-2], shape[-3]), dtype=torch.float32, device=query.device)


def _fake_backward(
    dout: Tensor, query: Tensor, key: Tensor | None, value: Tensor | None, out: Tensor, lse: Tensor, *rest: Any
) -> Gradients:
    """A gradient that nobody needs, or of what lies in query, is an empty tensor."""
    *call, needed = rest
    of = (query, key, value, *(call[place] for place in LEARNED))
    return tuple(  # type: ignore[return-value]
        query.new_empty(0) if x is None or not need else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x, need in zip(of, needed, strict=True)
    )


def _setup_context(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    query, key, value, *call, ctx.backend = args
    ctx.save_for_backward(query, key, value, *outputs, *(call[place] for place in TENSORS))
    ctx.call = [None if place in TENSORS else given for place, given in enumerate(call)]


def _backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    saved, call = ctx.saved_tensors, list(ctx.call)
    for place, tensor in zip(TENSORS, saved[5:], strict=True):
        call[place] = tensor
    places = (0, 1, 2, *(3 + place for place in LEARNED))
    needed = [ctx.needs_input_grad[place] for place in places]
    found = _attention_backward(dout, *saved[:5], *call, needed, ctx.backend)
    gradients: list[Tensor | None] = [None] * (3 + len(call))
    for place, gradient, need in zip(places, found, needed, strict=True):
        gradients[place] = gradient if need else None
    return tuple(gradients)


_attention_backward = Operator(
    "attention_backward",
    "(Tensor dout, Tensor query, Tensor? key, Tensor? value, Tensor out, Tensor lse, "
    + SCHEMA
    + ", bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    {
        "cpp": _backward_of(_attention_cpp.backward),
        "triton": _backward_of(_triton.lazy("attention", "backward")),
        "cuda": _backward_of(_attention_cuda.backward),
    },
    _fake_backward,
    public=6,
)
_attention = Operator(
    "attention",
    "(Tensor query, Tensor? key, Tensor? value, " + SCHEMA + ") -> (Tensor, Tensor)",
    {
        "cpp": _forward_of(_attention_cpp.forward),
        "triton": _forward_of(_triton.lazy("attention", "forward")),
        "cuda": _forward_of(_attention_cuda.forward),
    },
    _fake_forward,
    setup_context=_setup_context,
    backward=_backward,
)
_backends.declare("attention", *_attention.implementations)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    bias: Tensor | None = None,
    c2p: Tensor | None = None,
    p2c: Tensor | None = None,
    buckets: Tensor | None = None,
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
    window: a query at position p (i + K - S, as causal has it) sees the keys j with |p - j| <= window alone, both sides
        or, if causal, those before it. None, or 2 ** 30 and more: no window. What lies outside costs nothing.
    bias: (H, 2 R + 1) of any floating dtype, added to the scaled scores: `bias[h, clamp(j - p, -R, R) + R]` for a query
        at position p and key j. What comes of it is the relative position bias of MPNet and T5, of which a distance's
        bucket is looked up beforehand. Its gradient sums over diagonals, in a fixed order.
    c2p, p2c, buckets: disentangled attention (He et al. 2020): the score is scale · (query · key + c2p[p, h, b] +
        p2c[j, h, b]) with b = buckets[clamp(j - p, -R, R) + R]. c2p is like query and p2c like key, with W buckets for
        the head dimension; either may be left out. buckets: int32 or int64 (2 R + 1,), 0 <= b < W.
    scale: factor of the scores; None means D ** -0.5.
    dropout_p: probability of dropping an attention weight, honoured to 2⁻¹⁶, by fasttune's shared generator at
        (position of the query, sequence · H + head, position of the key).
    cu_seqlens: int32 or int64 (N + 1,), first row of each sequence and T at the end: 0, ..., T. Sequences may be empty.
    max_seqlen: length of the longest packed sequence, if known; saves the torch backend from computing it.
    cu_seqlens_q, positions_q: queries of some positions only, against all keys. query is then (R, H, D); cu_seqlens_q
        (N + 1,) holds the first query of each sequence, positions_q int32 or int64 (R,) each query's position in its
        sequence, never falling, counted from 0. Such a row is what it would be among all: causal, window, distances
        and dropout go by position. A query behind the last key (at padding, or of a sequence longer than its keys)
        sees all of them, or those in its window; one before the first key, at a negative position, too.
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
    check_layout("query", query, cu_seqlens, "(B, S, H, D)", "(T, H, D)", 4)
    shape = query.shape
    if (cu_seqlens_q is None) != (positions_q is None) or (positions_q is not None and cu_seqlens is None):
        raise ValueError(
            "attention: cu_seqlens_q and positions_q choose queries of packed sequences; expected both, with"
            " cu_seqlens, or neither."
        )
    if positions_q is not None:
        assert cu_seqlens_q is not None
        check_chosen(query, cu_seqlens, cu_seqlens_q, positions_q)
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
    window = check_window(window)
    terms = check_terms(query, key, bias, c2p, p2c, buckets)
    scale, seed, chosen = _check_options(key, scale, dropout_p, cu_seqlens, max_seqlen, backend)
    if positions_q is not None and chosen != "cpp" and query.device.type == "cpu" and not torch.compiler.is_compiling():
        check_positions(positions_q, cu_seqlens_q)
    call = Call(cu_seqlens, cu_seqlens_q, positions_q, max_seqlen, seed, causal, scale, dropout_p, window, *terms)
    if chosen == "torch":
        return attention_reference(query, key, value, call)
    return _attention(query, key, value, *call, chosen)


def attention_packed_qkv(
    qkv: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    bias: Tensor | None = None,
    c2p: Tensor | None = None,
    p2c: Tensor | None = None,
    buckets: Tensor | None = None,
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
    check_layout("qkv", qkv, cu_seqlens, "(B, S, 3, H, D)", "(T, 3, H, D)", 5)
    if qkv.shape[-3] != 3:
        expected = (*qkv.shape[:-3], 3, *qkv.shape[-2:])
        check_shape("attention", "qkv", qkv, expected, "query, key and value in the third dimension from the end")
    query = qkv.select(-3, 0)
    window = check_window(window)
    terms = check_terms(query, query, bias, c2p, p2c, buckets)
    scale, seed, chosen = _check_options(query, scale, dropout_p, cu_seqlens, max_seqlen, backend)
    call = Call(cu_seqlens, None, None, max_seqlen, seed, causal, scale, dropout_p, window, *terms)
    if chosen == "torch":
        return attention_reference(*_parts(qkv, None, None), call)
    return _attention(qkv, None, None, *call, chosen)


def _check_options(
    query: Tensor,
    scale: float | None,
    dropout_p: float,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    backend: str | None,
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
    chosen = _backends.choose("attention", query, backend)
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
