"""Elementwise functions at the ends of a dtype's range: what torch gives in float64, or no worse than torch gives."""

from collections.abc import Callable, Sequence

import torch
from oracle import run
from torch import Tensor


def special(dtype: torch.dtype) -> list[float]:
    """Around 0, where activations bend, where they are saturated, where their squares overflow, and the ends."""
    largest = torch.finfo(dtype).max
    positive = [0.0, 1.0, 60.0, 200.0, largest, float("inf")]
    return [*positive, *(-x for x in positive), float("nan")]


def combinations(inputs: int, dtype: torch.dtype) -> list[Tensor]:
    """Every combination of special numbers, for so many inputs and an upstream gradient."""
    values = torch.tensor(special(dtype), dtype=torch.float64)
    return [x.flatten().to(dtype) for x in torch.meshgrid([values] * (inputs + 1), indexing="ij")]


def assert_no_worse(fused: Callable[..., Tensor], stock: Callable[..., Tensor], tensors: Sequence[Tensor]) -> None:
    """Output and gradients for the inputs and the upstream gradient in `tensors`, element by element.

    NaN where torch has it in float64 and in the dtype, and nowhere where torch has it in neither; but in a gradient for
    an infinite gate or upstream gradient it may be missing, since torch's depends on how a derivative is composed.
    Elsewhere an error of at most twice torch's and a few units in the last place.
    """
    *inputs, upstream = tensors
    ours, theirs = run(fused, inputs, upstream), run(stock, inputs, upstream)
    exact = run(stock, [x.double() for x in inputs], upstream.double())
    for i, (value, other, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        what = "output" if i == 0 else f"gradient {i - 1}"
        expected, finite = truth.to(value.dtype), i == 0 or ~torch.stack([x.isinf() for x in tensors[1:]]).any(0)
        wrong = value.isnan() & ~(truth.isnan() | other.isnan())
        wrong |= ~value.isnan() & truth.isnan() & other.isnan() & finite
        error, allowed = (value.double() - expected.double()).abs(), (other.double() - expected.double()).abs()
        # Twice the smallest normal number: below it, a place is lost with every power of two.
        ulps = 8 * torch.finfo(value.dtype).eps * expected.double().abs() + 2 * torch.finfo(value.dtype).tiny
        known = ~(value.isnan() | truth.isnan() | other.isnan())
        wrong |= known & (value != expected) & ~(error <= 2 * allowed.nan_to_num(0.0) + ulps.nan_to_num(0.0, 0.0, 0.0))
        if wrong.any():
            at = int(wrong.nonzero()[0])
            given = [x[at].item() for x in tensors]
            raise AssertionError(
                f"{what} of {given}: {value[at].item()}, in float64 {truth[at].item()}, stock {other[at].item()}"
                f" ({int(wrong.sum())} of {wrong.numel()})"
            )
