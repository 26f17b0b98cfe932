"""Later: a tensor that is computed when somebody reads it, whole; what a cache is filled with in training, where hardly
anybody looks into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fasttune.patching.promises.on_demand import OnDemand


class Later(OnDemand):
    """function() of a known shape, dtype and device."""

    function: Callable[[], Tensor]
    value: Tensor | None

    @staticmethod
    def of(
        function: Callable[[], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        kind: type[Later] | None = None,
    ) -> Later:
        """kind: a class derived from this one, to be made instead."""
        make: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        later: Later = make(Later if kind is None else kind, shape, dtype=dtype, device=device)
        later.function, later.value = function, None
        return later

    def materialize(self) -> Tensor:
        if self.value is None:
            self.value = self.function()
        return self.value

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.cat and (alone := _alone(args[0])) is not None:
            return alone
        return func(*_ready(args), **_ready(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*_ready(args), **_ready(kwargs or {}))


def _alone(tensors: Any) -> Later | None:
    """The one tensor of a concatenation that is not empty: a growing cache begins with nothing."""
    filled = [tensor for tensor in tensors if tensor.numel() > 0]
    return filled[0] if len(filled) == 1 and type(filled[0]) is Later else None


def _ready(value: Any) -> Any:
    if isinstance(value, Later):
        return value.materialize()
    if isinstance(value, dict):
        return {key: _ready(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_ready(item) for item in value)
    return value


_METADATA = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim")} | {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point)
}
