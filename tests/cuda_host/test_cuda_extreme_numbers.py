"""The CUDA kernels, run on the host, at the ends of float32's range."""

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_parity, run

from fasttune import ops


@pytest.mark.parametrize("columns", [64, 3000])
def test_layer_norm_whose_squares_overflow(columns):
    x = torch.randn(3, columns)
    x[:, 3] = 3e38
    ours = run(lambda x: ops.layer_norm(x, None, None, backend="cuda"), [x], torch.randn(3, columns))
    assert all((value == 0).all() for value in ours)


@pytest.mark.parametrize("offset", [-1000.0, 30000.0])
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_smoothed_loss_of_logits_far_from_zero(offset, smoothing):
    low, target = torch.randn(8, 3000) + offset, torch.randint(0, 3000, (8,))
    exact, stock, ours = (
        run(lambda x, function=function: function(x, target, label_smoothing=smoothing), [logits], torch.ones(()))
        for function, logits in (
            (F.cross_entropy, low.double()),
            (F.cross_entropy, low),
            (lambda *a, **o: ops.cross_entropy(*a, backend="cuda", **o), low),
        )
    )
    for what, *values in zip(("loss", "gradient"), ours, stock, exact, strict=True):
        assert_parity(*values, what=what)


@pytest.mark.parametrize("upstream", [1e-30, 1e30])
def test_gradient_from_a_tiny_or_huge_upstream(upstream):
    logits, target = 4 * torch.randn(8, 3000), torch.randint(0, 3000, (8,))
    factor = torch.tensor(upstream)
    exact = run(lambda x: F.cross_entropy(x, target, reduction="sum"), [logits.double()], factor.double())
    stock = run(lambda x: F.cross_entropy(x, target, reduction="sum"), [logits], factor)
    ours = run(lambda x: ops.cross_entropy(x, target, reduction="sum", backend="cuda"), [logits], factor)
    assert_parity(ours[1], stock[1], exact[1])
