"""act(a) * b, a gated linear unit between the linear layers of a transformer's MLP, in one pass each way."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _backends
from fasttune.ops._activations import (
    LAUNCHERS,
    check_activation,
    empty_bias_gradient,
    halves,
    run_backward,
    run_forward,
)
from fasttune.ops._checks import check_device, check_floating, check_shape, describe
from fasttune.ops._operator import Operator
from fasttune.ops._reference.activation import gated_activation as gated_activation_reference

# Shape legend: a and da (..., 2 * columns), b None and db without elements, or all four (..., columns); out and dout
# (..., columns); bias and dbias (2 * columns,), the activated half's before the gate's.


def _forward(backend: str, a: Tensor, b: Tensor | None, bias: Tensor | None, activation: int) -> Tensor:
    out = _fake(a, b, bias, activation)
    run_forward(backend, *halves(a, b), bias, out, activation)
    return out


def _gradients(
    backend: str,
    dout: Tensor,
    a: Tensor,
    b: Tensor | None,
    bias: Tensor | None,
    activation: int,
    need_da: bool,
    need_db: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    da, db, dbias = _fake_backward(dout, a, b, bias, activation, need_da, need_db, need_dbias)
    if b is not None:
        dx, dgate = da if need_da else None, db if need_db else None
    else:
        dx, dgate = halves(da, None) if need_da else (None, None)
    wanted = (dx, dgate, dbias if need_dbias else None)
    run_backward(backend, dout, *halves(a, b), bias, *wanted, a.shape[-1], activation)
    return da, db, dbias


def _fake(a: Tensor, b: Tensor | None, bias: Tensor | None, activation: int) -> Tensor:
    shape = a.shape if b is not None else (*a.shape[:-1], a.shape[-1] // 2)
    return torch.empty(shape, dtype=a.dtype, device=a.device)


def _fake_backward(
    dout: Tensor,
    a: Tensor,
    b: Tensor | None,
    bias: Tensor | None,
    activation: int,
    need_da: bool,
    need_db: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty gradients; one that is not needed has no elements."""
    da = torch.empty(a.shape if need_da else (0,), dtype=a.dtype, device=a.device)
    db = torch.empty(b.shape if need_db and b is not None else (0,), dtype=a.dtype, device=a.device)
    return da, db, empty_bias_gradient(a, bias, need_dbias)


def _setup_context(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
    a, b, bias, ctx.activation, ctx.backend = args
    ctx.save_for_backward(a, b, bias)


def _backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    a, b, bias = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    found = _gated_activation_backward(dout, a, b, bias, ctx.activation, *needs, ctx.backend)
    return *(gradient if need else None for gradient, need in zip(found, needs, strict=True)), None


_gated_activation_backward = Operator(
    "gated_activation_backward",
    "(Tensor dout, Tensor a, Tensor? b, Tensor? bias, int activation, bool need_da, bool need_db, bool need_dbias)"
    " -> (Tensor, Tensor, Tensor)",
    {backend: partial(_gradients, backend) for backend in LAUNCHERS},
    _fake_backward,
    public=3,
)
_gated_activation = Operator(
    "gated_activation",
    "(Tensor a, Tensor? b, Tensor? bias, int activation) -> Tensor",
    {backend: partial(_forward, backend) for backend in LAUNCHERS},
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
_backends.declare("gated_activation", *_gated_activation.implementations)


def gated_activation(
    a: Tensor,
    b: Tensor | None = None,
    *,
    activation: str = "gelu",
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """act(a) * b: the gated linear unit between an MLP's linear layers, GeGLU, SwiGLU or ReGLU by its activation.

    a: (..., columns), and without b (..., 2 * columns): the half to activate, then the gate, as one linear layer
        leaves them. float32, bfloat16 or float16 (float64 on the torch backend); rows may be strided, so that chunks
        of one tensor are read in place.
    b: the gate, in a's shape and dtype, or None.
    activation: as in `bias_activation`.
    bias: (2 * columns,), in a's dtype or float32, or None: added first, the first columns to the half to activate, the
        others to the gate.
    backend: "cpp", "triton", "cuda", "torch" or None to choose.

    Returns (..., columns), computed in float32 and rounded once. Nothing but the arguments is kept for backward. a gets
    one gradient in its own shape, whose halves are written where they belong; that of the bias comes of the same pass.
    Source: Shazeer 2020, "GLU variants improve Transformer".

    Raises TypeError and ValueError for arguments that do not fit together, before any memory is touched, and
    RuntimeError for a backend that cannot run here.
    """
    operation = "gated_activation"
    check_floating(operation, "a", a)
    if a.dim() == 0:
        raise ValueError(f"{operation}: a is {describe(a)}; expected at least one dimension, the last one columns.")
    if b is None and a.shape[-1] % 2:
        raise ValueError(f"{operation}: a is {describe(a)} without b; expected an even last dimension, of two halves.")
    if b is not None:
        check_floating(operation, "b", b)
        check_shape(operation, "b", b, a.shape, "like a")
        check_device(operation, "b", b, a.device, "a")
        if b.dtype != a.dtype:
            raise TypeError(f"{operation}: b is {describe(b)}; expected {a.dtype} like a.")
    if bias is not None:
        check_floating(operation, "bias", bias)
        check_shape(operation, "bias", bias, (a.shape[-1] * (1 if b is None else 2),), "one per column of both halves")
        check_device(operation, "bias", bias, a.device, "a")
        if bias.dtype not in (a.dtype, torch.float32):
            raise TypeError(f"{operation}: bias is {describe(bias)}; expected {a.dtype} like a, or float32.")
    number = check_activation(operation, activation)
    chosen = _backends.choose(operation, a, backend)
    if chosen == "torch":
        return gated_activation_reference(a, b, bias, activation)
    return _gated_activation(a, b, bias, number, chosen)
