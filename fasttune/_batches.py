"""Batches and what a model makes of them: calling, copying, finding the tensors inside. For `fasttune.verify`."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def call(side: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return side(**batch)
    return side(*batch) if isinstance(batch, tuple) else side(batch)


def twin(value: T, double: bool = False) -> T:
    """A copy of a batch, its tensors leaves of their own. double: floating tensors in float64."""
    made: Any = value
    if isinstance(value, Tensor):
        made = value.detach().clone()
        if value.is_floating_point() and double:
            made = made.double()
        made.requires_grad_(value.requires_grad)
    elif isinstance(value, Mapping):
        made = copy.copy(value)  # keeps the class: BatchEncoding is no dict
        for key in value:
            made[key] = twin(value[key], double)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        made = type(value)(*(twin(item, double) for item in value))
    elif isinstance(value, (tuple, list)):
        made = type(value)(twin(item, double) for item in value)
    return made


def tensors(value: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of all tensors inside nested mappings, sequences and objects (a cache, a dataclass); a number
    counts as a tensor."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield path, value
        return
    if isinstance(value, (bool, int, float)):
        yield path, torch.tensor(value)
        return
    if value is None or isinstance(value, (str, bytes, type, nn.Module)) or callable(value) or id(value) in seen:
        return
    seen.add(id(value))
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif hasattr(value, "__dict__"):
        items = vars(value).items()
    for name, item in items:
        yield from tensors(item, f"{path}.{name}" if path else str(name), seen)


def own_loss(outputs: Any) -> Tensor | None:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def projection(outputs: Any) -> Tensor | None:
    """Fixed normal numbers times the outputs, in float64: it rounds nothing of its own."""
    terms = []
    for place, (_, value) in enumerate(tensors(outputs)):
        if value.is_floating_point() and value.requires_grad:
            generator = torch.Generator().manual_seed(place)
            weights = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
            terms.append((value.double() * weights).sum() / math.sqrt(max(value.numel(), 1)))
    return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else None


def leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors whose `.grad` a backward pass would write, as far as the graph shows them."""
    if loss.grad_fn is None:
        yield loss
        return
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            yield variable
        waiting += [following for following, _ in node.next_functions]


def synchronize(batch: Any) -> None:
    if any(value.is_cuda for _, value in tensors(batch)):
        torch.cuda.synchronize()
