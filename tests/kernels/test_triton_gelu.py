"""The Triton bias + GELU: what a frozen bias saves, and the bytes it moves."""

import torch
from interpreter.memory import traffic

from fasttune import ops


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


def test_bytes_moved_are_the_minimum(moves_at_most):
    x, bias = torch.randn(512, 768).bfloat16().requires_grad_(), torch.randn(768).bfloat16().requires_grad_()
    with traffic() as forward:
        out = ops.bias_gelu(x, bias, backend="triton")
    with traffic() as backward:
        torch.autograd.grad(out, (x, bias), torch.ones_like(out))
    moves_at_most("bias_gelu forward", forward, 2 * x.nbytes)
    moves_at_most("bias_gelu backward", backward, 3 * x.nbytes)
