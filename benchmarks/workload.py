"""What a benchmark row is: one piece of work, and the sides that can do it.

A side is built only where it runs (a side of a training step owns a model; memory is measured in a process of its
own), so it is given as a function that makes the inputs and returns the step to time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from products import Product
from torch import Tensor

Step = Callable[[], Any]
OURS, COMPILED = "fasttune", "torch.compile"


@dataclass(frozen=True)
class Workload:
    group: str  # the operation, or "training step"
    shape: str
    dtype: str
    sides: dict[str, Callable[[], Step]]  # OURS first, then the peers; COMPILED only if asked for
    products: Callable[[], list[Product]] | None = None  # the matrix products that the work needs
    useful_bytes: int = 0  # least traffic to memory: see `useful_bytes`
    kept_bytes: int = 0  # what one step hands back: output and gradients
    memory: bool = False  # measure the extra memory of every side
    notes: dict[str, Any] = field(default_factory=dict)


def size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def useful_bytes(inputs: Sequence[Tensor], output: Tensor) -> int:
    """Forward reads the inputs and writes the output; backward reads the inputs and the upstream gradient again and
    writes a gradient for each input."""
    return 3 * size(*inputs) + 2 * size(output)


def forward_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor | None = None
) -> Callable[[], Step]:
    """A side that runs function(*inputs) and its backward; integer inputs get no gradient."""

    def build() -> Step:
        leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]

        def step() -> None:
            torch.autograd.grad(function(*leaves), wanted, upstream)

        return step

    return build


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
