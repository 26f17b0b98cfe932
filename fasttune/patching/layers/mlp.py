"""A linear layer with its activation: alone, gated, and before a LayerNorm, in modules that run as they stand."""

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


def dense_activation(module: Any, hidden: Tensor, dense: Any, act: Any) -> Tensor | None:
    """act(dense(hidden)), the bias added in the activation's pass; None where the module has to run as it is."""
    kind = _fusible(module, hidden, dense, act)
    if kind is None or dense.bias is None:
        return None
    module._fasttune.note()
    product = F.linear(hidden, dense.weight)
    return ops.bias_activation(product, dense.bias, activation=kind, backend=module._fasttune.backend)


def gated_activation(module: Any, hidden: Tensor, dense: Any, act: Any) -> Tensor | None:
    """act(first half) * second half of dense(hidden); None where the module has to run as it is."""
    kind = _fusible(module, hidden, dense, act)
    if kind is None:
        return None
    module._fasttune.note()
    return ops.gated_activation(dense(hidden), activation=kind, backend=module._fasttune.backend)


def _fusible(module: Any, hidden: Tensor, dense: Any, act: Any) -> str | None:
    """The activation's name where the module's work may be done for it."""
    kind, why = activation_of(act)
    why = why or why_unknown(dense, nn.Linear) or why_replaced(stock_class(type(module)))
    if why is not None:
        module._fasttune.aside(why)
        return None
    return kind if module._fasttune.fused(hidden) else None


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
    options: dict[str, Any] = {"eps": norm.eps, "approximate": GELUS[kind], "backend": backend}
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
                function, (*inner.weights, weight, bias), norm.normalized_shape[0]
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


GELUS = {"gelu": "none", "gelu_tanh": "tanh"}  # as torch calls them


def activation_of(function: Any) -> tuple[str, str | None]:
    """(its name in fasttune.ops, None), or why an activation cannot be fused."""
    try:
        _, kind = activation(function)
    except Unknown as unknown:
        return "", str(unknown)
    return kind, None if kind else f"its activation is {function!r}, which has no fused pass"


def gelu_of(function: Any) -> tuple[str, str | None]:
    """The same of a GELU, by erf or tanh."""
    kind, why = activation_of(function)
    return kind, why or (None if kind in GELUS else f"its activation is {function!r}, not GELU")


def why_no_activation(name: str) -> Callable[[Any], str | None]:
    """A check for `Replacement.unsuited`: the activation held by attribute `name`."""
    return lambda module: _lasting(activation_of(getattr(module, name))[1])


def why_no_gelu(name: str) -> Callable[[Any], str | None]:
    return lambda module: _lasting(gelu_of(getattr(module, name))[1])


def _lasting(why: str | None) -> str | None:
    return why if why is None or "hooks" not in why else None  # hooks may go again; they are seen at each call
