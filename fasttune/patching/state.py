"""What a patch leaves on a model: one attribute, `_fasttune`, on each module it touched. Plain data: a patched model
can be deep-copied and pickled, and the copy can be unpatched."""

from __future__ import annotations

import copy
import importlib
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fasttune.ops import _backends
from fasttune.patching.options import Options

ATTRIBUTE = "_fasttune"


@dataclass
class Settings:
    """Shared by all modules of one patched model."""

    options: Options
    family: str  # name of the family's module in fasttune.patching.families
    asides: dict[tuple[str, str], int] = field(default_factory=dict)  # (what, why) -> calls that stepped aside

    def aside(self, what: str, why: str) -> None:
        if not torch.compiler.is_compiling():  # it would guard on the counter and compile anew at each call
            self.asides[what, why] = self.asides.get((what, why), 0) + 1


@dataclass
class ModulePatch:
    """`module._fasttune` of a module whose class was exchanged, or that was only marked (attention)."""

    settings: Settings
    operation: str
    does: str  # as in the report
    within: tuple[nn.Module, ...] = ()  # the modules around a head, whose backward hooks want its output's gradient
    place: tuple[int, int] | None = None  # of a layer: which one of how many

    def __post_init__(self) -> None:
        self.backend = self.settings.options.requested_backend

    @property
    def selects_rows(self) -> bool:
        """Whether a head computes only the rows that somebody reads."""
        return bool(self.settings.options.trim)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModulePatch:
        # A head that is copied alone (PEFT's modules_to_save does that) stays inside the modules it was in.
        twin = copy.copy(self)
        twin.settings = copy.deepcopy(self.settings, memo)
        twin.within = tuple(memo.get(id(module), module) for module in self.within)
        return twin

    def fused(self, x: Tensor) -> bool:
        """Whether a fused kernel would run on x; the torch backend only where it was asked for."""
        return runs_fused(self.operation, x.device.type, x.dtype, self.backend)

    def aside(self, why: str) -> None:
        """Notes that this call took the stock path, for the report."""
        self.settings.aside(self.does, why)


def reading_waits(device: torch.device) -> bool:
    """Whether looking at a tensor's values makes the host wait for the device."""
    return device.type != "cpu"


def environment_backend() -> str | None:
    return os.environ.get("FASTTUNE_BACKEND") or None


def runs_fused(operation: str, device: str, dtype: torch.dtype, backend: str | None) -> bool:
    """Whether an operation would run on a fused kernel there; the torch backend counts only where it was asked for."""
    environment = environment_backend()
    if _backends._choose(operation, device, dtype, backend, environment) != "torch":
        return True
    return (backend or environment) == "torch"


@dataclass
class ConfigSwap:
    """The config object a model came with, and the copy it holds while patched."""

    original: Any
    copy: Any
    before: dict[str, Any]  # the copy's attributes when it was made

    def carry_over(self) -> None:
        """Sets on the original what its user changed on the copy meanwhile."""
        now = vars(self.copy)
        for name in now.keys() | self.before.keys():
            if name not in now:
                vars(self.original).pop(name, None)
            elif name not in self.before or now[name] is not self.before[name]:
                vars(self.original)[name] = now[name]


@dataclass
class ModelPatch:
    """`model._fasttune` of the patched model itself."""

    settings: Settings
    config: ConfigSwap | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A model unpickled in a fresh process needs its attention functions registered with Transformers.
        self.__dict__.update(state)
        importlib.import_module("fasttune.patching.attention")


def patch_of(module: nn.Module) -> Any:
    """`module._fasttune` or None."""
    return module.__dict__.get(ATTRIBUTE)
