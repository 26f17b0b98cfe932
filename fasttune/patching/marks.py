"""What a patch leaves on a module: one attribute, `_fasttune`. Plain data: a patched model can be deep-copied, and the
copy can be unpatched; a pickle holds the stock module (fasttune/patching/layers/patched.py)."""

from __future__ import annotations

import copy
import os
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fasttune.ops import _backends
from fasttune.patching.options import Options
from fasttune.patching.premises.known import is_sharded

ATTRIBUTE = "_fasttune"


@dataclass
class Settings:
    """Shared by all modules of one patched model. ran: packing, trim or layers -> calls in which they ran; asides: (one
    of them, why) -> calls in which it stepped aside; reads: reader -> promised tensors of which it read every row."""

    options: Options
    family: str  # name of the family's module in fasttune.patching.families
    part: Any = None  # weak reference to the patched model
    ran: Counter[str] = field(default_factory=Counter)
    asides: Counter[tuple[str, str]] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    reads_all: bool = False  # a hint: outside training somebody will read every row of the last hidden state

    def sharded(self) -> bool:
        """Whether `fully_shard` was called on the model or a part of it: weights are whole only while they are used."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return False
        part = self.part() if self.part is not None else None
        return part is not None and any(is_sharded(module) for module in part.modules())

    def __deepcopy__(self, memo: dict[int, Any]) -> Settings:
        twin = copy.copy(self)
        twin.ran, twin.asides, twin.reads = Counter(self.ran), Counter(self.asides), Counter(self.reads)
        memo[id(self)] = twin
        part = self.part() if self.part is not None else None
        if id(part) in memo:  # the model is copied with its modules
            twin.part = weakref.ref(memo[id(part)])
        return twin

    def note(self, what: str) -> None:
        if not torch.compiler.is_compiling():
            self.ran[what] += 1

    def aside(self, what: str, why: str) -> None:
        if not torch.compiler.is_compiling():
            self.asides[what, why] += 1

    def read(self, reader: str) -> None:
        self.reads[reader] += 1


@dataclass
class ModulePatch:
    """`module._fasttune` of a module whose class was exchanged. calls: in which it ran; asides: why -> those in which
    it stepped aside."""

    settings: Settings
    operation: str
    does: str  # as in the report
    tied: bool = False  # of an embedding: a head of the model shares its weight
    calls: int = 0
    asides: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.backend = self.settings.options.requested_backend

    def __deepcopy__(self, memo: dict[int, Any]) -> ModulePatch:
        twin = copy.copy(self)
        twin.settings, twin.asides = copy.deepcopy(self.settings, memo), Counter(self.asides)
        return twin

    def fused(self, x: Tensor) -> bool:
        """Whether a fused kernel would run on x; the torch backend only where it was asked for."""
        return not unusual() and runs_fused(self.operation, x.device.type, x.dtype, self.backend)

    def note(self) -> None:
        if not torch.compiler.is_compiling():  # it would guard on the counter and compile anew at each call
            self.calls += 1

    def aside(self, why: str) -> None:
        """Notes that this call took the stock path, for the report."""
        if not torch.compiler.is_compiling():
            self.asides[why] += 1


@dataclass
class ModelPatch:
    """`model._fasttune` of the patched model itself, unless it is a module whose class was exchanged. In a pickle,
    which holds the stock model, it is None."""

    settings: Settings

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelPatch:
        return ModelPatch(copy.deepcopy(self.settings, memo))

    def __reduce__(self) -> Any:
        return type(None), ()


def unusual() -> bool:
    """Whether something is under way that operators with a derivative of their own do not take part in: tracing, a
    functional transform, forward-mode derivatives."""
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def reading_waits(device: torch.device) -> bool:
    """Whether looking at a tensor's values makes the host wait for the device."""
    return device.type != "cpu"


def environment_backend() -> str | None:
    return os.environ.get("FASTTUNE_BACKEND") or None


def runs_fused(operation: str, device: str, dtype: torch.dtype, backend: str | None) -> bool:
    """Whether an operation would run on a fused kernel there; the torch backend counts only where it was asked for."""
    if device == "meta":
        return False
    environment = environment_backend()
    if _backends._choose(operation, device, dtype, backend, environment) != "torch":
        return True
    return (backend or environment) == "torch"


def patch_of(module: nn.Module) -> Any:
    """`module._fasttune` or None."""
    return module.__dict__.get(ATTRIBUTE)
