"""The base of every replacement class."""

from __future__ import annotations

import copy
import copyreg
from typing import TYPE_CHECKING, Any

from torch import nn

from fasttune.patching.marks import ATTRIBUTE, ModulePatch
from fasttune.patching.premises.known import stock_class


class Patched(nn.Module):
    """`module._fasttune` says how it was patched. A deep copy stays patched; a pickle holds the stock module, and loads
    where there is no fasttune."""

    _fasttune: ModulePatch

    if TYPE_CHECKING:  # the submodules of the stock class

        def __getattr__(self, name: str) -> Any: ...

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        state = {name: value for name, value in self.__dict__.items() if name != ATTRIBUTE}
        rebuild = copyreg._reconstructor  # type: ignore[attr-defined]
        return rebuild, (stock_class(type(self)), object, None), state, *reduced[3:]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin
