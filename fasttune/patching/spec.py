"""What a model family is: data. The engine reads it, the report prints it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# Which rows (B, S) of the last hidden state a head reads, given its forward's arguments by name, the padding mask
# (B, S) and the config. None stands for all of them.
RowReader = Callable[[Mapping[str, Any], Tensor, Any], Tensor | None]

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
    lazy: bool = False  # its output may be a LazyRows
    pays_in_torch: bool = False  # worth it on the torch backend too (work is skipped, not only fused)

    def matches(self, name: str, module: nn.Module) -> bool:
        """Also a replaced module that was moved elsewhere since, as PEFT does with a layer that it adapts."""
        return isinstance(module, self.by) or (self.named(name) and isinstance(module, self.stock))

    def named(self, name: str) -> bool:
        return not self.only or _PEFT_COPY.sub("", name).rpartition(".")[2] in self.only


@dataclass(frozen=True)
class Family:
    """One model family of Transformers."""

    name: str
    heads: Mapping[type[nn.Module], RowReader]  # the models `patch` accepts
    replacements: tuple[Replacement, ...]
    attentions: tuple[type[nn.Module], ...]  # modules that call the attention function; they are marked only
    layers: Callable[[Any], Iterable[nn.Module]]  # of a model: its stack of layers, first to last

    def replacement(self, name: str, module: nn.Module) -> Replacement | None:
        """The first replacement that speaks of this module."""
        return next((rule for rule in self.replacements if rule.matches(name, module)), None)
