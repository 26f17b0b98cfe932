"""Which GELU an activation of Transformers is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import activations

from fasttune.patching.plain import why_not_plain

_KINDS: dict[type, str] = {
    activations.GELUActivation: "none",
    activations.NewGELUActivation: "tanh",
    activations.GELUTanh: "tanh",
    activations.FastGELUActivation: "tanh",
}


def gelu_kind(activation: Any) -> str:
    """ "none" (erf) or "tanh" as in torch's `approximate`; "" if it is no GELU or may not be bypassed."""
    if activation is nn.functional.gelu or activation is torch._C._nn.gelu:
        return "none"
    if type(activation) is nn.GELU and why_not_plain(activation, nn.GELU) is None:
        return str(activation.approximate)
    kind = _KINDS.get(type(activation), "")
    return kind if kind and why_not_plain(activation, type(activation)) is None else ""


def why_no_gelu(name: str) -> Any:
    """A check for `Replacement.unsuited`: the activation held by attribute `name`."""

    def check(module: Any) -> str | None:
        activation = getattr(module, name)
        return None if gelu_kind(activation) else f"its activation is {activation!r}, not GELU"

    return check
