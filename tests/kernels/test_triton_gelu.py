"""The Triton bias + GELU against stock torch in the tested dtype and in float64, and the bytes it moves."""

import pytest
import torch
import torch.nn.functional as F
from interpreter.memory import traffic
from oracle import DTYPES, assert_same_math

from fasttune import ops


# 70 x 200: ragged tiles on both axes, several a program; values far out on both sides.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_matches_stock(approximate, dtype):
    assert_same_math(
        lambda x, bias: ops.bias_gelu(x, bias, approximate=approximate, backend="triton"),
        lambda x, bias: F.gelu(x + bias, approximate=approximate),
        [(torch.randn(7, 60, 200) * 5).to(dtype), torch.randn(200).to(dtype)],
        ("x", "bias"),
    )


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_far_values_neither_overflow_nor_turn_into_nan(approximate):
    x = torch.tensor([[-3e38, -1e20, -200.0, -12.0, 12.0, 200.0, 1e20, 3e38]], requires_grad=True)
    out = ops.bias_gelu(x, None, approximate=approximate, backend="triton")
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out[0, 4:], x[0, 4:])
    assert (grad[0, 4:] == 1).all()
    assert torch.isfinite(out).all()
    assert (out[0, 2:4].abs() < 1e-30).all()
    assert (grad[0, :4].abs() < 1e-20).all()


def test_frozen_bias_and_no_rows():
    bias = torch.randn(16)
    x = torch.randn(3, 16, requires_grad=True)
    with traffic() as moved:
        torch.autograd.grad(ops.bias_gelu(x, bias, backend="triton").sum(), x)
    assert ("column_sums_kernel", "load") not in moved
    empty = torch.randn(0, 16, requires_grad=True)
    grads = torch.autograd.grad(ops.bias_gelu(empty, bias.requires_grad_(), backend="triton").sum(), (empty, bias))
    assert grads[0].shape == (0, 16)
    assert (grads[1] == 0).all()


def test_bytes_moved_are_the_minimum():
    x, bias = torch.randn(512, 768).bfloat16().requires_grad_(), torch.randn(768).bfloat16().requires_grad_()
    with traffic() as forward:
        out = ops.bias_gelu(x, bias, backend="triton")
    with traffic() as backward:
        torch.autograd.grad(out, (x, bias), torch.ones_like(out))
    print(f"bias_gelu: forward {forward.total() / (2 * x.nbytes):.3f} x minimum", end=", ")
    print(f"backward {backward.total() / (3 * x.nbytes):.3f} x minimum")
    assert forward.total() <= 1.05 * 2 * x.nbytes
    assert backward.total() <= 1.05 * 3 * x.nbytes
