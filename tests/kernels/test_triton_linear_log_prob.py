"""The Triton kernels of linear_log_prob: the bytes of a chunk, the same bits each time, and all of its chunks' rows."""

from collections import Counter

import pytest
import torch
from interpreter.memory import traffic

from fasttune import ops
from fasttune.kernels import linear_chunks


def problem(rows, features, classes):
    """input, weight, bias, all of which need gradients, and ids."""
    tensors = torch.randn(rows, features), torch.randn(classes, features) / features**0.5, torch.randn(classes)
    ids = torch.randint(0, classes, (rows,))
    ids[1::4] = -100
    return *(tensor.requires_grad_() for tensor in tensors), ids


def step(x, weight, bias, ids):
    found = ops.linear_log_prob(x, weight, ids, linear_bias=bias, scale=0.7, backend="triton")
    total = sum((i + 1) * result.sum() for i, result in enumerate(found[:4]))
    return [*found, *torch.autograd.grad(total, (x, weight, bias))]


def test_two_runs_give_the_same_bits():
    problems = problem(37, 48, 500)
    assert all(map(torch.equal, step(*problems), step(*problems)))


@pytest.mark.parametrize("rows", [1, 5, 15])
def test_chunks_change_no_row(monkeypatch, rows):
    """Results are the rows' own, and their sums differ by roundings."""
    problems = problem(37, 48, 500)
    expected = step(*problems)
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", rows * 512 * 4)
    for ours, whole in zip(step(*problems), expected, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-5)


def test_forward_reads_the_logits_once_and_backward_replaces_them(moves_at_most):
    x, weight, _, _ = problem(6, 8, 30522)
    with traffic() as moved:
        found = ops.linear_log_prob(x, weight, torch.arange(6), backend="triton")
        (found.log_prob + found.entropy).sum().backward()
    logits = 6 * 30522 * 4
    for kernel, passes in (("log_prob_forward_kernel", 1), ("log_prob_backward_kernel", 2)):
        of_kernel = Counter({key: count for key, count in moved.items() if key[0] == kernel})
        moves_at_most(f"linear_log_prob, {kernel}", of_kernel, passes * logits)
