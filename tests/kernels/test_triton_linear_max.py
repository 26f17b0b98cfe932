"""The Triton kernels of linear_max: bytes of a forward, classes without a gradient, the same bits each time."""

import torch
from interpreter.memory import traffic

from fasttune import ops
from fasttune.kernels import linear_max as kernel

OFFSETS = torch.tensor([0, 40, 40, 41, 130], dtype=torch.int32)


def problem(classes=300, dtype=torch.float32):
    """input, weight, bias."""
    return [torch.randn(shape).to(dtype) for shape in ((130, 48), (classes, 48), (classes,))]


def test_logits_never_go_through_memory():
    x, weight, bias = problem(256)
    with traffic() as moved:
        out, token = kernel.linear_max(x, weight, bias, OFFSETS)
    assert moved["linear_max_forward_kernel", "store"] == out.nbytes + token.nbytes
    # Of 4 blocks of 64 classes and 4 sequences in 4 tiles of tokens: rows of x once a block, of w once a tile.
    least = 4 * x.nbytes + 4 * weight.nbytes + 4 * bias.nbytes
    assert moved["linear_max_forward_kernel", "load"] <= 1.05 * least


def test_classes_without_a_gradient_are_not_read():
    x, weight, bias = problem()
    _, token = kernel.linear_max(x, weight, bias, OFFSETS)
    dout = torch.zeros(4, 300)
    with traffic() as moved:
        kernel.linear_max_backward(dout, x, weight, bias, OFFSETS, token, True, True, False)
    numbers = dout.nbytes + token.nbytes  # by each block of columns and tile of tokens that looks for its own
    assert moved["linear_max_dinput_kernel", "load"] <= 4 * numbers + 4096
    assert moved["linear_max_dweight_kernel", "load"] <= 2 * numbers


def test_two_runs_give_the_same_bits():
    leaves = [tensor.requires_grad_() for tensor in problem()]

    def gradients():
        out = ops.linear_max(*leaves[:2], OFFSETS, linear_bias=leaves[2], backend="triton")
        return torch.autograd.grad(out, leaves, torch.linspace(-1, 1, 1200).view(4, 300))

    assert all(torch.equal(one, two) for one, two in zip(gradients(), gradients(), strict=True))
