"""patch, unpatch, patched.

One mechanism: a module of a known class gets `module.__class__ = Replacement`, a subclass with the same name that
overrides methods only, and one attribute, `module._fasttune`. Parameters, buffers, hooks, names, configs and gradient
checkpointing (which lives in the class) are untouched; `unpatch` restores the class and deletes the attribute.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from torch import nn

from fasttune.ops import _backends
from fasttune.patching.families import family_of, supported_models
from fasttune.patching.families.spec import Family, Replacement
from fasttune.patching.layers.patched import Patched
from fasttune.patching.marks import (
    ATTRIBUTE,
    ModelPatch,
    ModulePatch,
    Settings,
    environment_backend,
    patch_of,
)
from fasttune.patching.options import Options
from fasttune.patching.premises.known import HARMLESS, is_sharded, stock_class, why_replaced, why_watched

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
    packing, trim: padding leaves before the first layer; a layer computes only rows that are read. True and "auto" are
        the same.
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
    for _, family in found:
        _check_backend(family, options)
    unpatch(model)
    for part, family in found:
        _patch_part(part, family, options)
    return model


def unpatch(model: Model) -> Model:
    """Puts everything back, bit for bit; returns the same object. Does nothing to a model that is not patched."""
    for module in list(model.modules()):
        if patch_of(module) is None:
            continue
        stock = _stock_class(type(module))
        if stock is not type(module):
            module.__class__ = stock
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
    """The outermost supported models in `model`, itself included, each once."""
    yield from _supported_parts(model, set())


def _supported_parts(model: nn.Module, seen: set[int]) -> Iterator[tuple[nn.Module, Family]]:
    if id(model) in seen:
        return
    seen.add(id(model))
    family = family_of(model)
    if family is not None:
        yield model, family
        return
    for child in model.children():
        yield from _supported_parts(child, seen)


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
    if rule.stock.__module__.startswith("torch.") and (watched := why_watched(module, HARMLESS)) is not None:
        return watched
    why = why_replaced(rule.stock) or rule.unsuited(module)
    return why or why_no_backend(rule.operation, options, pays_in_torch=rule.pays_in_torch)


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
    settings = Settings(options, family.name, weakref.ref(part), reads_all=isinstance(part, family.of_every_token))
    tied = _tied_weight(part)
    for name, module in part.named_modules():
        rule = family.replacement(name, module)
        if rule is not None and why_left_alone(name, module, rule, options) is None:
            module.__class__ = rule.by
            mark = ModulePatch(settings, rule.operation, rule.does)
            mark.tied = isinstance(module, nn.Embedding) and module.weight is tied
            setattr(module, ATTRIBUTE, mark)
    if patch_of(part) is None:
        setattr(part, ATTRIBUTE, ModelPatch(settings))


def _tied_weight(part: nn.Module) -> Any:
    """The weight that a model's head shares with its lookup, None if it has a head of its own, or none."""
    head, table = (getattr(part, f"get_{which}_embeddings", lambda: None)() for which in ("output", "input"))
    weight = getattr(head, "weight", None)
    return weight if weight is not None and weight is getattr(table, "weight", None) else None


def _stock_class(cls: type[nn.Module]) -> type[nn.Module]:
    """From a replacement back to the stock class, its base of the same name."""
    if cls.__module__.startswith("fasttune."):
        return stock_class(cls)
    # A wrapper may have derived its own class from the replacement since (fully_shard does). Transformers puts a
    # forward into each class derived from a checkpointing layer, and will do so again.
    bases = tuple(_stock_class(base) if issubclass(base, Patched) else base for base in cls.__bases__)
    if bases == cls.__bases__:
        return cls
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__", "forward")}
    metaclass: Any = type(cls)
    return metaclass(cls.__name__, bases, members)
