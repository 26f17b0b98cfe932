"""The Triton gated activation: the bytes it moves, of halves where they lie, and sums that a frozen bias saves."""

import torch
from interpreter.memory import traffic

from fasttune import ops


def test_bytes_moved_are_the_minimum(moves_at_most):
    a = torch.randn(512, 768).bfloat16().requires_grad_()
    with traffic() as forward:
        out = ops.gated_activation(a, backend="triton")
    with traffic() as backward:
        torch.autograd.grad(out, a, torch.ones_like(out))
    moves_at_most("gated_activation forward", forward, 1.5 * a.nbytes)
    moves_at_most("gated_activation backward", backward, 2.5 * a.nbytes)
    assert ("column_sums_kernel", "load") not in backward
