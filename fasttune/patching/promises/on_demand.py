"""The base of tensors that hold no values until somebody reads them: printing, copying and pickling read."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class OnDemand(Tensor):
    def materialize(self) -> Tensor:
        """The values as an ordinary tensor in the autograd graph."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to compute its values.")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.materialize())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.materialize().detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().detach().__reduce_ex__(protocol)
