"""The Triton chunk loop of linear_cross_entropy: float16's range, the same bits each time, and the bytes of a chunk."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from interpreter.memory import traffic

from fasttune import ops
from fasttune.kernels import linear_chunks
from fasttune.kernels import linear_cross_entropy as kernel


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 15 rows of 500 float32 logits: 37 rows take three."""
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", 15 * 512 * 4)


def problem(rows, features, classes, dtype=torch.float32):
    """input, weight, bias, target; logits of the size that a trained head has."""
    tensors = torch.randn(rows, features), torch.randn(classes, features) / features**0.5, torch.randn(classes)
    target = torch.randint(0, classes, (rows,))
    target[1::4] = -100
    target[0] = classes - 1
    return *(tensor.to(dtype) for tensor in tensors), target


def test_float16_gradients_survive_division_by_many_rows():
    # p / 30000 is 1e-7 here, float16's last bit, were it divided before the products. The upstream factor is what loss
    # scaling has.
    x, weight, _, target = problem(32, 8, 300, torch.float16)
    leaves = [x.requires_grad_(), weight.requires_grad_()]

    def gradients(loss, leaves):
        return torch.autograd.grad(loss.float() * 2.0**15, leaves)

    ours = gradients(ops.linear_cross_entropy(*leaves, target, normalizer=3e4, backend="triton"), leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = gradients(F.cross_entropy(F.linear(*exact), target, reduction="sum").float() / 3e4, exact)
    for gradient, true in zip(ours, truth, strict=True):
        assert (gradient.double() - true).abs().max() < 4 * torch.finfo(torch.float16).eps * true.abs().max()


def test_an_upstream_factor_of_one_costs_no_traffic():
    factor = torch.tensor(1.0)
    with traffic() as moved:
        same = kernel.scale_in_place(torch.arange(5000.0), factor)
    assert moved["scale_kernel", "store"] == 0
    assert torch.equal(same, torch.arange(5000.0))
    assert torch.equal(kernel.scale_in_place(torch.arange(5000.0), factor * 3), torch.arange(5000.0) * 3)


def test_two_runs_give_the_same_bits():
    *tensors, target = problem(37, 48, 500)
    leaves = [tensor.requires_grad_() for tensor in tensors]

    def gradients():
        loss = ops.linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], backend="triton")
        return torch.autograd.grad(loss, leaves)

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_the_chunk_step_reads_the_logits_twice_and_writes_them_once(monkeypatch, moves_at_most):
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", 2**30)
    x, weight = torch.randn(6, 8).requires_grad_(), torch.randn(30522, 8).requires_grad_()
    with traffic() as moved:
        ops.linear_cross_entropy(x, weight, torch.arange(6), backend="triton")
    logits = 6 * 30522 * 4
    step = Counter({key: count for key, count in moved.items() if key[0] == "cross_entropy_forward_kernel"})
    moves_at_most("linear_cross_entropy, a chunk between its products", step, 3 * logits)
