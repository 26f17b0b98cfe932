"""A linear layer with its GELU, alone and before a LayerNorm, in modules that run as they stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttune import ops
from fasttune.patching.layers.entry import source_of
from fasttune.patching.layers.frozen import Unknown, activation, linear
from fasttune.patching.premises.known import stock_class, why_replaced, why_unknown
from fasttune.patching.promises.tensor import PromisedRows


def dense_gelu(module: Any, hidden: Tensor, dense: Any, act: Any) -> Tensor | None:
    """act(dense(hidden)), the bias added in the activation's pass; None where the module has to run as it is."""
    patch = module._fasttune
    kind, why = gelu_of(act)
    why = why or why_unknown(dense, nn.Linear) or why_replaced(stock_class(type(module)))
    if why is not None or dense.bias is None or not patch.fused(hidden):
        if why is not None:
            patch.aside(why)
        return None
    patch.note()
    product = F.linear(hidden, dense.weight)
    return ops.bias_gelu(product, dense.bias, approximate=kind, backend=patch.backend)


def transform(module: Any, hidden: Tensor, dense: Any, act: Any, norm: Any) -> Tensor | None:
    """LayerNorm(GELU(dense(hidden))), as promised rows of promised rows; None where the module has to run as it is."""
    patch = module._fasttune
    kind, why = gelu_of(act)
    why = why or why_unknown(norm, nn.LayerNorm) or why_replaced(stock_class(type(module)))
    if why is None and not patch.fused(hidden):
        return None
    if why is not None:
        patch.aside(why)
        return None
    patch.note()
    backend = patch.backend
    options: dict[str, Any] = {"eps": norm.eps, "approximate": kind, "backend": backend}
    weight, bias = norm.weight, norm.bias
    waits = isinstance(hidden, PromisedRows) and hidden.untouched() and bool(patch.settings.options.trim)
    if not waits and _may_wait(module, hidden):
        hidden, waits = _of_tensor(hidden), True
    if waits:
        try:
            inner = linear(dense)
        except Unknown as unknown:
            patch.aside(str(unknown))
        else:
            function = lambda rows, ids: ops.gelu_layer_norm(inner(rows, ids), weight, bias, **options)  # noqa: E731
            promised: PromisedRows = hidden.mapped(  # type: ignore[attr-defined]
                function, (*inner.weights, weight, bias), weight.shape[0]
            )
            return promised
    return ops.gelu_layer_norm(dense(hidden), weight, bias, **options)


def _may_wait(module: Any, hidden: Tensor) -> bool:
    """Whether a head in training may compute its transform for the rows that a loss reads."""
    return (
        module.training
        and module._fasttune.settings.options.loss
        and bool(module._fasttune.settings.options.trim)
        and torch.is_grad_enabled()
        and hidden.requires_grad
        and hidden.dim() == 3
        and not torch.compiler.is_compiling()
        and not isinstance(hidden, PromisedRows)
        and 0 not in hidden.shape
        and not module._fasttune.settings.sharded()
        and module._fasttune.fused(hidden)
    )


def _of_tensor(hidden: Tensor) -> PromisedRows:
    return PromisedRows.of(source_of(hidden), hidden.shape[:-1])


def gelu_of(function: Any) -> tuple[str, str | None]:
    """("none" or "tanh", None), or why an activation cannot be fused."""
    try:
        _, kind = activation(function)
    except Unknown as unknown:
        return "", str(unknown)
    return kind, None if kind else f"its activation is {function!r}, not GELU"


def why_no_gelu(name: str) -> Callable[[Any], str | None]:
    """A check for `Replacement.unsuited`: the activation held by attribute `name`."""

    def check(module: Any) -> str | None:
        _, why = gelu_of(getattr(module, name))
        return why if why is None or "hooks" not in why else None  # hooks may go again; they are seen at each call

    return check
