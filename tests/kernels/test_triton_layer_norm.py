"""The Triton LayerNorm: the same bits every time, and the bytes it moves."""

import torch
from interpreter.memory import traffic

from fasttune import ops


def inputs(rows, columns, dtype):
    return [torch.randn(rows, columns).to(dtype), *(torch.randn(2, columns) + 1).to(dtype)]


def test_two_runs_give_the_same_bits():
    x, weight, bias = (tensor.requires_grad_() for tensor in inputs(200, 100, torch.float32))
    upstream = torch.randn(200, 100)

    def gradients():
        return torch.autograd.grad(ops.layer_norm(x, weight, bias, backend="triton"), (x, weight, bias), upstream)

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_bytes_moved_are_the_minimum(moves_at_most):
    # What is not x, y, dy or dx: statistics, parameters and partial sums. The last two are paid once a program; the
    # interpreter's grid has 6 programs for 512 rows, an H100's 264 for at least 16384 at the same share.
    x, weight, bias = inputs(512, 768, torch.bfloat16)
    with traffic() as forward:
        out = ops.layer_norm(x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), backend="triton")
    with traffic() as backward:
        torch.autograd.grad(out, (x, weight, bias), torch.ones_like(out))
    moves_at_most("layer_norm forward", forward, 2 * x.nbytes)
    moves_at_most("layer_norm backward", backward, 3 * x.nbytes)
