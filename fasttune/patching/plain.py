"""Whether a module may be bypassed: a fused path does the work of several modules without calling each of them."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this module: its weights are whole only while it runs."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def why_not_plain(module: nn.Module, *classes: type[nn.Module]) -> str | None:
    """None if calling `module` does nothing but its class's own forward, and the class is exactly one of `classes`;
    else a reason."""
    if type(module) not in classes:
        return f"{type(module).__name__} is not the {classes[0].__name__} it takes the place of"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"hooks on {type(module).__name__}"
    if "forward" in module.__dict__:
        return f"{type(module).__name__}.forward was replaced on the instance"
    if _has_any_global_hook():
        return "global module hooks"
    return None
