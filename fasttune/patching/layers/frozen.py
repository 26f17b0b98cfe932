"""Modules as they were when a layer was called: their weights and numbers, as functions of rows.

What is computed later must not ask the modules again: somebody may have called `eval()`, changed a probability or
switched adapters meanwhile. Capturing a module is also where its premises are proven: it is of a known class, runs what
this class ships, and nobody looks in. Otherwise `Unknown` says why, and the layer runs stock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import activations
from transformers.pytorch_utils import Conv1D

from fasttune import ops
from fasttune.ops._random import draw_seed, repeating
from fasttune.patching.premises.known import is_sharded, why_unknown, why_watched


class Unknown(Exception):
    """Why a module cannot be captured."""


def known(module: Any, *classes: type) -> Any:
    """The module, if it is plainly one of these classes; raises Unknown."""
    why = why_unknown(module, *classes)
    if why is not None:
        raise Unknown(why)
    return module


def plain_weight(weight: Any) -> Tensor:
    """A weight that is an ordinary tensor; raises Unknown."""
    if type(weight) is not nn.Parameter or hasattr(weight, "ds_id"):
        raise Unknown(f"a weight is a {type(weight).__name__}, not a parameter of the module's own (sharded?)")
    return weight


class Linear:
    """x @ weight + bias of nn.Linear and Conv1D."""

    def __init__(self, module: Any) -> None:
        known(module, nn.Linear, Conv1D)
        if is_sharded(module):
            raise Unknown("its weights are sharded")
        self.transposed = isinstance(module, Conv1D)
        self.weight = plain_weight(module.weight)
        self.bias = None if module.bias is None else plain_weight(module.bias)
        self.weights = [self.weight] if self.bias is None else [self.weight, self.bias]

    def __call__(self, x: Tensor, row_ids: Tensor | None) -> Tensor:
        if not self.transposed:
            return F.linear(x, self.weight, self.bias)
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def product(self, x: Tensor) -> Tensor:
        """Without the bias."""
        return x @ self.weight if self.transposed else F.linear(x, self.weight)

    def part(self, x: Tensor, row_ids: Tensor | None, begin: int, end: int) -> Tensor:
        """Some columns of the output."""
        bias = None if self.bias is None else self.bias[begin:end]
        if not self.transposed:
            return F.linear(x, self.weight[begin:end], bias)
        weight = self.weight[:, begin:end]
        return x @ weight if bias is None else torch.addmm(bias, x, weight)


class Adapted:
    """A linear layer with a LoRA adapter of PEFT's: a replica of the module, its dropouts by the numbers of rows."""

    def __init__(self, module: Any) -> None:
        self.dropouts: list[_RowDropout] = []
        self.weights: list[Tensor] = []
        if getattr(module, "lora_variant", None):
            raise Unknown("a variant of LoRA")
        self.replica = self._replica(module)

    def _replica(self, module: nn.Module) -> nn.Module:
        """The same weights under copies of the module's own attributes."""
        name = type(module).__module__
        if not name.startswith("peft."):
            if type(module) not in (nn.ModuleDict, nn.ParameterDict):
                known(module, nn.Linear, Conv1D, nn.Dropout, nn.Identity)
        elif (why := why_watched(module)) is not None:
            raise Unknown(why)
        if isinstance(module, nn.Dropout):
            if not module.training or module.p == 0.0:
                return nn.Identity()
            self.dropouts.append(_RowDropout(module.p, draw_seed(_device_of(self.weights))))
            return self.dropouts[-1]
        copy = object.__new__(type(module))
        shallow = (dict, list, set)
        copy.__dict__ = {k: v.copy() if type(v) in shallow else v for k, v in module.__dict__.items()}
        self.weights += [plain_weight(p) for p in module._parameters.values() if p is not None]
        copy._modules = {n: None if m is None else self._replica(m) for n, m in module._modules.items()}
        return copy

    def __call__(self, x: Tensor, row_ids: Tensor | None) -> Tensor:
        for dropout in self.dropouts:
            dropout.row_ids = row_ids
        out: Tensor = self.replica.forward(x)
        return out

    def part(self, x: Tensor, row_ids: Tensor | None, begin: int, end: int) -> Tensor:
        return self(x, row_ids)[:, begin:end]


class _RowDropout(nn.Module):
    """Dropout of rows with given numbers."""

    def __init__(self, p: float, seed: Tensor) -> None:
        super().__init__()
        self.p, self.seed = p, [seed]
        self.row_ids: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        with repeating(self.seed):
            return ops.dropout(x, dropout_p=self.p, row_ids=self.row_ids)


def linear(module: Any) -> Linear | Adapted:
    """A captured linear layer; raises Unknown."""
    cls = type(module)
    if cls.__module__ == "peft.tuners.lora.layer" and cls.__name__ == "Linear":
        return Adapted(module)
    return Linear(module)


class Norm:
    """LayerNorm over the last dimension."""

    def __init__(self, module: Any) -> None:
        known(module, nn.LayerNorm)
        if len(module.normalized_shape) != 1:
            raise Unknown("a LayerNorm over more than one dimension")
        self.eps = float(module.eps)
        self.weight, self.bias = (None if w is None else plain_weight(w) for w in (module.weight, module.bias))
        self.weights = [weight for weight in (self.weight, self.bias) if weight is not None]
        # With norms=False the patch has left the class alone, and torch's own LayerNorm runs.
        self.fused = type(module) is not nn.LayerNorm

    def __call__(self, x: Tensor, backend: str | None) -> Tensor:
        if self.fused:
            return ops.layer_norm(x, self.weight, self.bias, eps=self.eps, backend=backend)
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


def probability(module: Any) -> float:
    """Of a dropout; raises Unknown."""
    known(module, nn.Dropout)
    return float(module.p) if module.training else 0.0


def activation(function: Any) -> tuple[Callable[[Tensor], Tensor], str]:
    """(the function, its name for `ops.bias_activation`, "" if that has none); raises Unknown unless it is
    elementwise."""
    if isinstance(function, nn.Module):
        cls = type(function)
        if cls.__module__ not in ("transformers.activations", "torch.nn.modules.activation"):
            raise Unknown(f"its activation is {function!r}")
        if cls in (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.GLU, nn.MultiheadAttention, nn.RReLU):
            raise Unknown(f"its activation is {function!r}")
        known(function, cls)
        if any(True for _ in function.parameters()):
            raise Unknown(f"its activation {cls.__name__} has weights")
        if isinstance(function, nn.GELU):
            return function.forward, "gelu" if function.approximate == "none" else "gelu_tanh"
        return function.forward, _MODULES.get(cls, "")
    for known_one, name in _FUNCTIONS.items():
        if function is known_one:
            return function, name
    raise Unknown(f"its activation is {function!r}")


_MODULES: dict[type, str] = {
    activations.GELUActivation: "gelu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
    activations.ReLUSquaredActivation: "relu2",
    nn.ReLU: "relu",
    activations.SiLUActivation: "silu",
    nn.SiLU: "silu",
}
_ELEMENTWISE = (F.tanh, torch.tanh, F.mish, F.sigmoid, torch.sigmoid, F.elu, F.leaky_relu)
_FUNCTIONS: dict[Any, str] = {
    F.gelu: "gelu",
    torch._C._nn.gelu: "gelu",
    F.relu: "relu",
    torch.relu: "relu",
    F.silu: "silu",
} | dict.fromkeys(_ELEMENTWISE, "")


def _device_of(weights: list[Tensor]) -> torch.device:
    return weights[0].device if weights else torch.device("cpu")
