"""Numbers at the ends of float32's range: what stock torch gives, or nearer to float64."""

import pytest
import torch
import torch.nn.functional as F
from fused import BACKENDS, FUSED
from oracle import DTYPES, assert_parity, run

from fasttune import ops

ROWS, CLASSES = 8, 3000  # three blocks of 1024 classes, the last one ragged


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_whose_squares_overflow(isa, dtype, backend):
    """The variance is infinite, and everything 0: not the norm by a variance of 0."""
    x = torch.randn(3, 64).to(dtype)
    x[:, 3] = 3e38
    names = ("x", "weight", "bias")
    weight, bias = torch.randn(64, dtype=dtype), torch.randn(64, dtype=dtype)
    upstream = torch.randn(3, 64)
    ours = run(lambda *a: ops.layer_norm(*a, backend=backend), [x, weight, bias], upstream)
    stock, exact = (
        run(lambda x, w, b: F.layer_norm(x, (64,), w, b), inputs, upstream)
        for inputs in ([x, weight, bias], [x.float(), weight.float(), bias.float()])
    )
    for what, *values in zip(("output", *names), ours, stock, exact, strict=True):
        assert values[0].isfinite().all(), what
        assert_parity(*values[:2], values[2].double(), what=what)


def losses(function, low, target, **options):
    return run(lambda logits: function(logits, target, **options), [low], torch.ones(()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [-1000.0, 1000.0, 30000.0])
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rising", [False, True])
def test_smoothed_loss_of_logits_far_from_zero(isa, backend, offset, smoothing, weighted, rising):
    """rising: each block of classes has a new largest logit, to which the sums before it are moved."""
    low = torch.randn(ROWS, CLASSES) + offset
    if rising:
        low += torch.arange(CLASSES) / CLASSES * 8
    target = torch.randint(0, CLASSES, (ROWS,))
    weight = torch.rand(CLASSES) if weighted else None
    options = {"label_smoothing": smoothing, "weight": weight}
    exact = losses(
        F.cross_entropy, low.double(), target, **{**options, "weight": None if weight is None else weight.double()}
    )
    stock = losses(F.cross_entropy, low, target, **options)
    ours = losses(ops.cross_entropy, low, target, backend=backend, **options)
    for what, *values in zip(("loss", "gradient"), ours, stock, exact, strict=True):
        assert_parity(*values, what=what)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("upstream", [1e-30, 1e-36, 1e30])
def test_gradient_from_a_tiny_or_huge_upstream(isa, backend, upstream):
    logits, target = 4 * torch.randn(ROWS, CLASSES), torch.randint(0, CLASSES, (ROWS,))
    factor = torch.tensor(upstream)
    exact = run(lambda x: F.cross_entropy(x, target, reduction="sum"), [logits.double()], factor.double())
    stock = run(lambda x: F.cross_entropy(x, target, reduction="sum"), [logits], factor)
    ours = run(lambda x: ops.cross_entropy(x, target, reduction="sum", backend=backend), [logits], factor)
    assert_parity(ours[1], stock[1], exact[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_class_masked_by_minus_infinity_smooths_to_infinity(isa, dtype):
    logits, target = torch.randn(2, 50).to(dtype), torch.tensor([1, 2])
    logits[0, 7] = -float("inf")
    ours = ops.cross_entropy(logits, target, label_smoothing=0.1, reduction="none", backend=FUSED)
    stock = F.cross_entropy(logits.float(), target, label_smoothing=0.1, reduction="none")
    assert ours[0] == stock[0] == float("inf")
    assert ours[1].isfinite()
