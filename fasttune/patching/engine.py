"""patch, unpatch, patched: exchange the classes of a live model's modules, and put them back.

One mechanism: a module of a known class gets `module.__class__ = Replacement`, a subclass with the same name that
overrides methods only, and one attribute, `module._fasttune`. Parameters, buffers, hooks, names and gradient
checkpointing (which lives in the class) are untouched; `unpatch` restores the class and deletes the attribute.
Attention goes through Transformers' own registry: its switch lives on the config, so the patched model gets a copy.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from torch import nn

from fasttune.ops import _backends
from fasttune.patching import rows
from fasttune.patching.families import family_of, supported_models
from fasttune.patching.layers import Patched
from fasttune.patching.options import Options
from fasttune.patching.plain import is_sharded
from fasttune.patching.spec import Family, Replacement
from fasttune.patching.state import (
    ATTRIBUTE,
    ConfigSwap,
    ModelPatch,
    ModulePatch,
    Settings,
    environment_backend,
    patch_of,
)

Model = TypeVar("Model", bound=nn.Module)


class UnsupportedModelError(TypeError):
    """The model's class belongs to no family that fasttune knows; the message lists those it does."""


def patch(
    model: Model,
    *,
    attention: bool = True,
    norms: bool = True,
    mlp: bool = True,
    embeddings: bool = True,
    loss: bool = True,
    packing: bool | Literal["auto"] = "auto",
    trim: bool | Literal["auto"] = "auto",
    backend: str = "auto",
) -> Model:
    """Makes every training step of a Transformers model cheaper, in place; returns the same object.

    model: a supported model (see `UnsupportedModelError`'s message), or a module that holds one (a PEFT model, DDP,
        a model of your own around a BertModel). Patching a patched model patches it anew with these options.
    attention, norms, mlp, embeddings, loss: what to replace.
    packing, trim: padding leaves before the first layer; the last layer computes only rows that are read.
    backend: "auto", or "cpp", "triton", "cuda", "torch" for every operation.

    Raises UnsupportedModelError, TypeError or ValueError for options that do not exist, RuntimeError for a backend that
    cannot run here.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model is a {type(model).__name__}; expected a torch.nn.Module.")
    options = Options(attention, norms, mlp, embeddings, loss, packing, trim, backend)
    found = list(supported_parts(model))
    if not found:
        raise UnsupportedModelError(
            f"fasttune does not know {type(model).__name__}, nor any model inside it. Supported are"
            f" {supported_models()}."
        )
    unpatch(model)
    for part, family in found:
        _check_backend(family, options)
        _patch_part(part, family, options)
    return model


def unpatch(model: Model) -> Model:
    """Puts everything back, bit for bit; returns the same object. Does nothing to a model that is not patched."""
    for part in [module for module in model.modules() if isinstance(patch_of(module), ModelPatch)]:
        rows.unwatch(part)
        _restore_config(part, patch_of(part).config)
        delattr(part, ATTRIBUTE)
    for module in model.modules():
        if patch_of(module) is not None:
            module.__class__ = _stock_class(type(module))
            delattr(module, ATTRIBUTE)
    return model


@contextmanager
def patched(model: Model, **options: Any) -> Iterator[Model]:
    """`with fasttune.patched(model, **options):` patches for the duration of the block."""
    patch(model, **options)
    try:
        yield model
    finally:
        unpatch(model)


def supported_parts(model: nn.Module) -> Iterator[tuple[nn.Module, Family]]:
    """The outermost supported models in `model`, itself included."""
    family = family_of(model)
    if family is not None:
        yield model, family
        return
    for child in model.children():
        yield from supported_parts(child)


def why_left_alone(name: str, module: nn.Module, rule: Replacement, options: Options) -> str | None:
    """Why a module that a family's rule speaks of keeps its class; None if it is to be replaced."""
    if not options.wants(rule.group):
        return ", ".join(f"{option}=False" for option in rule.group.split(" or "))
    if is_sharded(module):
        return "it was sharded before it was patched; call fasttune.patch before fully_shard"
    if type(module) not in (rule.stock, rule.by):
        return f"its class is {type(module).__module__}.{type(module).__name__}, which may compute something else"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return rule.unsuited(module) or why_no_backend(rule.operation, options, pays_in_torch=rule.pays_in_torch)


def why_attention_left_alone(part: Any, options: Options) -> str | None:
    """Why a model keeps its attention function."""
    from fasttune.patching.attention import NAMES

    config = part.config
    current = config._attn_implementation
    if not options.attention:
        return "attention=False"
    if current not in NAMES and current not in NAMES.values():
        return f"attn_implementation={current!r} was chosen; only {' and '.join(NAMES)} are replaced"
    if config.output_attentions or (current == "eager" and getattr(config, "reorder_and_upcast_attn", False)):
        return "the config asks for eager attention (output_attentions or reorder_and_upcast_attn)"
    return why_no_backend("attention", options)


def why_no_backend(operation: str, options: Options, *, pays_in_torch: bool = False) -> str | None:
    """Left to itself, the torch backend composes what stock composes: nothing is gained by it."""
    forced = options.requested_backend or environment_backend()
    if pays_in_torch or forced == "torch" or _backends.available_backends(operation) != ("torch",):
        return None
    return f"no fused backend here for {operation}: {_backends.why_not(operation, 'cpp')}"


def _check_backend(family: Family, options: Options) -> None:
    """An explicit request never falls back."""
    if options.requested_backend is None:
        return
    operations = {rule.operation for rule in family.replacements if rule.operation and options.wants(rule.group)}
    for operation in sorted(operations | ({"attention"} if options.attention else set())):
        reason = _backends.why_not(operation, options.requested_backend)
        if reason is not None:
            raise RuntimeError(f"patch: backend={options.backend!r} was asked for {operation}, but {reason}.")


def _patch_part(part: nn.Module, family: Family, options: Options) -> None:
    settings = Settings(options, family.name)
    for name, module in part.named_modules():
        rule = family.replacement(name, module)
        if rule is not None and why_left_alone(name, module, rule, options) is None:
            module.__class__ = rule.by
            within = tuple(_around(part, name)) if rule.group == "loss" or rule.lazy else ()
            setattr(module, ATTRIBUTE, ModulePatch(settings, rule.operation, rule.does, within))
        elif isinstance(module, family.attentions):
            setattr(module, ATTRIBUTE, ModulePatch(settings, "attention", "attention"))
    layers = list(family.layers(part))
    for place, layer in enumerate(layers):
        if patch_of(layer) is not None:
            patch_of(layer).place = place, len(layers)
    swap = None
    if why_attention_left_alone(part, options) is None:
        swap = _swap_config(part)
    setattr(part, ATTRIBUTE, ModelPatch(settings, swap))
    rows.watch(part)


def _around(part: nn.Module, name: str) -> Iterator[nn.Module]:
    """`part` and the modules on the way to its submodule `name`, without that one."""
    names = name.split(".")
    for depth in range(len(names)):
        yield part.get_submodule(".".join(names[:depth]))


def _stock_class(cls: type[nn.Module]) -> type[nn.Module]:
    """From a replacement back to the stock class, its base of the same name."""
    if cls.__module__.startswith("fasttune."):
        return next(
            base
            for base in cls.__mro__
            if base.__name__ == cls.__name__ and not base.__module__.startswith("fasttune.")
        )
    # A wrapper may have derived its own class from the replacement since (fully_shard does). Transformers puts a
    # forward into each class derived from a checkpointing layer, and will do so again.
    bases = tuple(_stock_class(base) if issubclass(base, Patched) else base for base in cls.__bases__)
    if bases == cls.__bases__:
        return cls
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__", "forward")}
    metaclass: Any = type(cls)
    return metaclass(cls.__name__, bases, members)


def _swap_config(part: Any) -> ConfigSwap:
    names: dict[str, str] = importlib.import_module("fasttune.patching.attention").NAMES
    original = part.config
    replacement = copy.copy(original)
    replacement._attn_implementation_internal = names[original._attn_implementation]
    _exchange_config(part, original, replacement)
    return ConfigSwap(original, replacement, dict(vars(replacement)))


def _restore_config(part: Any, swap: ConfigSwap | None) -> None:
    if swap is not None:
        swap.carry_over()
        _exchange_config(part, swap.copy, swap.original)


def _exchange_config(part: nn.Module, old: Any, new: Any) -> None:
    for module in part.modules():
        if module.__dict__.get("config") is old:
            module.config = new
