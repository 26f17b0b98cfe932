"""float16 gradients of linear_cross_entropy under a loss scale, element by element.

They are computed in forward and wait for the upstream factor, which is what keeps small ones from underflow: they have
to wait in float32. Against the largest element alone that does not show.
"""

import pytest
import torch
import torch.nn.functional as F
from fused import FUSED, INTERPRETED

from fasttune import ops

SCALE = 2.0**14  # as torch.amp.GradScaler's, a power of two, and below float16's largest number
ROWS, FEATURES, CLASSES = 32, 8, 300


def problem(normalizer):
    """Unscaled, most gradients lie around or below float16's last bit, 6e-8."""
    x, weight = torch.randn(ROWS, FEATURES).half(), (torch.randn(CLASSES, FEATURES) / FEATURES**0.5).half()
    bias, target = torch.randn(CLASSES).half(), torch.randint(CLASSES, (ROWS,))
    target[3] = -100
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    options = {"linear_bias": bias, "normalizer": normalizer, "backend": FUSED}
    return leaves, target, ops.linear_cross_entropy(x, weight, target, **options)


def gradients(normalizer, upstream, retain_graph=False):
    torch.manual_seed(0)
    leaves, target, loss = problem(normalizer)
    if retain_graph:
        torch.autograd.grad(loss, leaves, retain_graph=True)
    return leaves, target, torch.autograd.grad(loss, leaves, torch.tensor(upstream).half(), retain_graph=retain_graph)


@pytest.mark.parametrize("divisor", [3.0, torch.tensor(3.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("retain_graph", [False, True])
def test_a_power_of_two_upstream_or_in_the_normalizer_gives_the_same_bits(isa, divisor, retain_graph):
    *_, waited = gradients(divisor * SCALE, SCALE, retain_graph)
    *_, direct = gradients(divisor, 1.0)
    for name, late, early in zip(("input", "weight", "bias"), waited, direct, strict=True):
        assert late.dtype == torch.float16
        assert torch.equal(late, early), name


def test_every_element_is_as_exact_as_its_terms(isa):
    """Each is a sum of terms; its error is bounded by that of its terms, not by the largest element's (Higham 2002,
    chapter 3): relative errors of the terms, one rounding a term of the sum, and the rounding of the result."""
    leaves, target, ours = gradients(3.0 * SCALE, SCALE)
    x, weight, bias = exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = F.linear(x, weight, bias)
    logits.retain_grad()
    (F.cross_entropy(logits, target, reduction="sum") / 3.0).backward()
    terms = logits.grad.abs()
    half, single = (torch.finfo(dtype).eps / 2 for dtype in (torch.float16, torch.float32))
    # A logit's error is that of p, relatively: twice, as it enters the sum of the exponentials too. The Triton kernels
    # hold logits and their gradients in float16, as stock does, the C++ library in float32.
    kept_in = half if INTERPRETED else single
    of_logits = 2 * kept_in * logits.abs().max() + 2 * (FEATURES + 1) * single * F.linear(x.abs(), weight.abs()).max()
    of_terms = of_logits + kept_in + 8 * single + CLASSES * single  # exp, a division, factors; the sum over classes
    if INTERPRETED:
        terms = terms + 2.0**-25 / 3.0  # float16's smallest step, before the division
    sums = [terms @ weight.abs(), terms.t() @ x.abs(), terms.sum(0)]
    for name, got, true, magnitude in zip(("input", "weight", "bias"), ours, exact, sums, strict=True):
        bound = (of_terms + max(CLASSES, ROWS) * single) * magnitude + half * true.grad.abs() + 2.0**-25
        excess = ((got.double() - true.grad).abs() / bound).max().item()
        assert excess <= 1, f"grad {name}: {excess:.3g} times its bound"
