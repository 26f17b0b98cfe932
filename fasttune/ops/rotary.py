"""Rotary position embedding (Su et al. 2021) of queries and keys, alone or inside a fused projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _backends, _cpp, _triton
from fasttune.ops._checks import check_device, check_floating, check_integer, check_shape, describe
from fasttune.ops._cuda import rotary as _cuda_rotary
from fasttune.ops._indices import check_integers, check_range
from fasttune.ops._operator import Operator
from fasttune.ops._reference.rotary import rotary as rotary_reference

# Shape legend: x (T, H, D) or (B, S, H, D), with parts (T, N, H, D) or (B, S, N, H, D); T = B S rows; cos, sin (P, W);
# row_ids (T,). Kernels see x as (B, S, N, H, D) with strides, and write `out`, which is contiguous.

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None", int, bool], None]


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _cpp_empty_like(x: Tensor) -> Tensor:
    return _cpp.empty_large(x.shape, x.dtype)  # 8 x 512 rows of query, key and value in float32 are 38 MB


def _launcher(kernel: Kernel, empty_like: Callable[[Tensor], Tensor] = _empty_like) -> Callable[..., Tensor]:
    """fasttune::rotary of a kernel(x, out, cos, sin, row_ids, rotated, inverse)."""

    def run(x: Tensor, cos: Tensor, sin: Tensor, row_ids: Tensor | None, rotated: int | None, inverse: bool) -> Tensor:
        out = empty_like(x)
        if out.numel():
            x = x if x.stride(-1) == 1 else x.contiguous()
            x = x.unsqueeze(-3) if rotated is None else x
            x = x.unsqueeze(0) if x.dim() == 4 else x
            kernel(x, out, cos.contiguous(), sin.contiguous(), row_ids, rotated or 1, inverse)
        return out

    return run


def _cpp_kernel(
    x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, row_ids: Tensor | None, rotated: int, inverse: bool
) -> None:
    if row_ids is not None:
        check_range("rotary", "row_ids", row_ids, cos.shape[0])
    _cpp.library.rotary(
        *(_cpp.DTYPE_CODES[x.dtype], _cpp.DTYPE_CODES[cos.dtype], x.data_ptr(), out.data_ptr()),
        *(cos.data_ptr(), sin.data_ptr(), _cpp.address(row_ids), tuple(x.shape), x.stride()[:4]),
        *(*cos.shape, rotated, inverse),
    )


def _fake(x: Tensor, cos: Tensor, sin: Tensor, row_ids: Tensor | None, rotated: int | None, inverse: bool) -> Tensor:
    return _empty_like(x)


def _setup_context(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, row_ids, ctx.rotated, ctx.inverse, ctx.backend = args
    ctx.save_for_backward(cos, sin, row_ids)


def _backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    dx = _rotary(dout, *ctx.saved_tensors, ctx.rotated, not ctx.inverse, ctx.backend)
    return dx, None, None, None, None, None


_rotary = Operator(
    "rotary",
    "(Tensor x, Tensor cos, Tensor sin, Tensor? row_ids, int? rotated, bool inverse) -> Tensor",
    {
        "cpp": _launcher(_cpp_kernel, _cpp_empty_like),
        "triton": _launcher(_triton.lazy("rotary", "rotary")),
        "cuda": _launcher(_cuda_rotary.rotary),
    },
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
_backends.declare("rotary", *_rotary.implementations)


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    row_ids: Tensor | None = None,
    rotated: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """x with pairs of columns (d, d + W / 2) turned by an angle that depends on the row: the position's.

    x: queries or keys (T, H, D), or (B, S, H, D) with T = B S rows; any strides, but for one copy where the last is not
        1; float32, bfloat16 or float16 (float64 on the torch backend).
    rotated: given, x is a packed projection (T, N, H, D) or (B, S, N, H, D), such as N = 3 of query, key and value; its
        first `rotated` parts are turned and the others copied.
    cos, sin: (P, W), one row per position, in x's dtype or float32; W is even and at most D: of a head, the first W
        columns are turned and the others copied. The halves of a row may differ. They get no gradient.
    row_ids: integers (T,), the row of cos and sin for each row of x; int64 is taken as it is. None: P = T, or P = S for
        the same rows in each of the B sequences.
    backend: "cpp", "triton", "cuda", "torch" or None to choose.

    With h = W / 2: out[d] = x[d] cos[d] - x[d + h] sin[d] for d < h, else x[d] cos[d] + x[d - h] sin[d], computed in
    float32 and rounded once. Returns a contiguous tensor like x. Backward needs cos, sin and row_ids alone.
    Source: Su et al. 2021 in the form of GPT-NeoX, as Transformers' apply_rotary_pos_emb.

    Raises TypeError and ValueError for arguments that do not fit together and, on a CPU, IndexError with the position
    of an id that is out of range, before any memory is touched; on a GPU such a row is NaN where it would be turned.
    """
    check_floating("rotary", "x", x)
    rows = _rows(x, rotated)
    _check_tables(x, cos, sin)
    if row_ids is not None:
        check_integers("rotary", "row_ids", row_ids)
        check_shape("rotary", "row_ids", row_ids, (rows.numel(),), "one per row of x")
        check_device("rotary", "row_ids", row_ids, x.device, "x")
        row_ids = row_ids.long().contiguous()
    elif cos.shape[0] not in (rows.numel(), rows[-1]):
        expected = " or ".join(str(n) for n in dict.fromkeys((rows.numel(), rows[-1])))
        raise ValueError(
            f"rotary: cos is {describe(cos)} and x is {describe(x)}; expected {expected} rows of cos, one per row of x,"
            " or row_ids."
        )
    chosen = _backends.choose("rotary", x, backend)
    if chosen == "torch":
        return rotary_reference(x, cos, sin, row_ids, rotated)
    out: Tensor = _rotary(x, cos, sin, row_ids, rotated, False, chosen)
    return out


def _rows(x: Tensor, rotated: int | None) -> torch.Size:
    """(T,) or (B, S) of x."""
    if rotated is None:
        if x.dim() not in (3, 4):
            raise ValueError(
                f"rotary: x is {describe(x)}; expected (T, H, D) or (B, S, H, D), or with `rotated` one dimension of"
                " parts more."
            )
        return x.shape[:-2]
    check_integer("rotary", "rotated", rotated)
    if x.dim() not in (4, 5):
        raise ValueError(
            f"rotary: x is {describe(x)}; expected (T, N, H, D) or (B, S, N, H, D), as rotated is {rotated}."
        )
    if not 1 <= rotated <= x.shape[-3]:
        raise ValueError(
            f"rotary: rotated is {rotated}; expected a number from 1 to {x.shape[-3]}, the parts of x, which is"
            f" {describe(x)}."
        )
    return x.shape[:-3]


def _check_tables(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_floating("rotary", "cos", cos)
    if cos.dim() != 2 or cos.shape[1] % 2 or not 2 <= cos.shape[1] <= x.shape[-1]:
        raise ValueError(
            f"rotary: cos is {describe(cos)}; expected (P, W) with W even, from 2 to {x.shape[-1]}, the last dimension"
            " of x."
        )
    check_floating("rotary", "sin", sin)
    check_shape("rotary", "sin", sin, cos.shape, "like cos")
    if sin.dtype != cos.dtype or cos.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"rotary: cos is {describe(cos)} and sin is {describe(sin)}; expected both in {x.dtype} like x, or in"
            " float32."
        )
    for name, table in (("cos", cos), ("sin", sin)):
        check_device("rotary", name, table, x.device, "x")
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"rotary: {name} requires a gradient, and gets none here; expected {name}.detach().")
