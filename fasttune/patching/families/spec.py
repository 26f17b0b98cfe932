"""What a model family is: data. The engine reads it, the report prints it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

_PEFT_COPY = re.compile(r"\.modules_to_save\.[^.]+$")  # where PEFT puts the copy of a module that is trained in full


@dataclass(frozen=True)
class Replacement:
    """A module of exactly the class `stock` becomes a `by`, a subclass that overrides methods only."""

    stock: type[nn.Module]
    by: type[nn.Module]
    group: str  # the option of `patch` that switches it
    operation: str  # the operation in fasttune.ops that does its main work; "" if it only skips work
    does: str  # for the report
    only: tuple[str, ...] = ()  # names of the attribute that holds it; empty: any
    covers: tuple[str, ...] = ()  # children whose work it does itself
    unsuited: Callable[[Any], str | None] = lambda module: None  # why this very module has to stay stock
    pays_in_torch: bool = False  # worth it on the torch backend too (work is skipped, not only fused)

    def matches(self, name: str, module: nn.Module) -> bool:
        """Also a replaced module that was moved elsewhere since, as PEFT does with a layer that it adapts."""
        return isinstance(module, self.by) or (self.named(name) and isinstance(module, self.stock))

    def named(self, name: str) -> bool:
        return not self.only or _PEFT_COPY.sub("", name).rpartition(".")[2] in self.only


@dataclass(frozen=True)
class Family:
    """One model family of Transformers.

    heads: the models that `patch` accepts. of_every_token: those of them that hand out something of every token, so
    that outside training all rows are computed at once: a hint for speed, nothing else depends on it.
    """

    name: str
    heads: tuple[type[nn.Module], ...]
    of_every_token: tuple[type[nn.Module], ...]
    replacements: tuple[Replacement, ...]

    def replacement(self, name: str, module: nn.Module) -> Replacement | None:
        """The first replacement that speaks of this module."""
        return next((rule for rule in self.replacements if rule.matches(name, module)), None)
