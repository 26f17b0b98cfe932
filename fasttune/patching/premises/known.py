"""Whether a module does what its class was shipped to do, and nothing else.

A fused path does the work of several modules without calling them. It may, if each of them is of a class whose forward
is the one that its library ships (a process-wide replacement is noticed), and nobody looks in: no forward on the
instance, no hooks, none of every module's. Hooks that change nothing are told apart by where they were defined.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

# Hooks that only gather and release weights, those that Transformers leaves behind after capturing outputs (they look
# at nothing unless asked again), and the one that makes the embeddings' output require gradients.
HARMLESS = ("torch.distributed.", "transformers.utils.output_capturing", "transformers.modeling_utils")


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this module: its weights are whole only while it runs."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def why_unknown(module: Any, *classes: type) -> str | None:
    """None if `module` is of one of `classes` (or a replacement that fasttune derived from it) and calling it runs what
    the class ships, no more; else a reason."""
    cls = type(module)
    if cls not in classes and stock_class(cls) not in classes:
        return f"{cls.__name__} is not the {classes[0].__name__} it takes the place of"
    return why_watched(module) or why_replaced(stock_class(cls))


def why_watched(module: nn.Module, harmless: tuple[str, ...] = ()) -> str | None:
    """Whether more than its class's forward runs when `module` is called. harmless: whose hooks do not count."""
    if "forward" in module.__dict__:
        return f"{type(module).__name__}.forward was replaced on the instance"
    for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
        if hooks and not all(str(getattr(h, "__module__", "")).startswith(harmless) for h in hooks.values()):
            return f"hooks on {type(module).__name__}"
    return "global module hooks" if _has_any_global_hook() else None


def why_replaced(cls: type, *methods: str) -> str | None:
    """Whether the forward found on a class, or another of its methods, is not the one it was shipped with."""
    if torch.compiler.is_compiling():  # a compiled region was looked at when the model was patched
        return None
    for name in ("forward", *methods):
        if not _shipped(cls, name, getattr(cls, name)):
            return f"{cls.__name__}.{name} was replaced for the whole process"
    return None


def stock_class(cls: type) -> type:
    """The class that a replacement of fasttune's stands for: its base of the same name; any other class itself."""
    if cls.__module__.startswith("fasttune."):
        return next(b for b in cls.__mro__ if b.__name__ == cls.__name__ and not b.__module__.startswith("fasttune."))
    return cls


@cache
def _shipped(cls: type, name: str, method: Any) -> bool:
    module = sys.modules.get(cls.__module__)
    if module is None:
        return False
    package = _folder(sys.modules[cls.__module__.partition(".")[0]])
    while True:  # through decorators, each of which has to come from the same package
        code = getattr(method, "__code__", None)
        if code is None or package is None or not Path(code.co_filename).is_relative_to(package):
            return False
        inner = getattr(method, "__wrapped__", None)
        if inner is None:
            owner = method.__qualname__.rpartition(".")[0]
            return (
                any(base.__module__ == method.__module__ and base.__qualname__ == owner for base in cls.__mro__)
                and code.co_name == name
            )
        method = inner


def _folder(package: ModuleType) -> Path | None:
    return Path(package.__file__).parent if package.__file__ else None
