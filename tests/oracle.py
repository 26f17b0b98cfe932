"""The error budget of every parity test.

The truth is the same computation in float64. Against it, fasttune may be off by at most twice what stock PyTorch is in
the tested dtype, plus one unit in the last place of the largest true value (the floor: stock may be exact by luck).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLOOR_ULPS = 1.0
# For sweeps over random shapes, see assert_parity: they look for wrong elements, the fixed cases for accuracy.
SWEEP_SLACK = 4.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def max_error(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact).abs().max().item() if exact.numel() else 0.0


def assert_parity(
    actual: Tensor,
    stock: Tensor,
    exact: Tensor,
    what: str = "value",
    slack: float = 1.0,
    again: Sequence[Tensor] = (),
) -> None:
    """|actual - exact| <= slack (2 |stock - exact| + 1 ulp of max |exact|), all as maxima over the tensor.

    again: stock's value by other roundings of the same mathematics (terms in another order); the largest error counts.
    slack: 1, but for sweeps over random shapes, where now and then stock is right by luck; the caller says what it saw.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == stock.dtype, f"{what}: dtype {actual.dtype}, expected {stock.dtype}"
    assert torch.isfinite(actual).all() or not torch.isfinite(exact).all(), f"{what}: not finite"
    largest = exact.abs().max().item() if exact.numel() else 0.0
    floor = FLOOR_ULPS * torch.finfo(actual.dtype).eps * largest
    ours, theirs = max_error(actual, exact), max(max_error(value, exact) for value in (stock, *again))
    assert ours <= slack * (2 * theirs + floor), f"{what}: error {ours:.3g}, stock {theirs:.3g}, floor {floor:.3g}"


def run(function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """[output, gradient of each input] of `function(*inputs)` under the upstream gradient, in the inputs' dtype."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def assert_same_math(
    fused: Callable[..., Tensor],
    stock: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    names: Sequence[str],
    slack: float = 1.0,
    again: Sequence[Callable[..., Tensor]] = (),
) -> None:
    """Output and every gradient of `fused` against `stock` in the inputs' dtype and in float64.

    again: other roundings of stock, see `assert_parity`.
    """
    shape = stock(*inputs).shape
    upstream = torch.randn(shape, dtype=torch.float64).to(inputs[0].dtype)
    exact = run(stock, [tensor.double() for tensor in inputs], upstream.double())
    others = [run(function, inputs, upstream) for function in again]
    for i, (what, ours, theirs, truth) in enumerate(
        zip(
            ("output", *(f"grad {name}" for name in names)),
            run(fused, inputs, upstream),
            run(stock, inputs, upstream),
            exact,
            strict=True,
        )
    ):
        assert_parity(ours, theirs, truth, what, slack, [other[i] for other in others])
