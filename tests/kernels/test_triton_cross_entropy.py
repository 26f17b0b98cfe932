"""The Triton cross-entropy: its tiles at every alignment, labels out of range, and the bytes it moves."""

import pytest
import torch
import torch.nn.functional as F
from interpreter.memory import traffic
from oracle import assert_same_math

from fasttune import ops

OPTIONS = [{}, {"label_smoothing": 0.1, "reduction": "none", "weighted": True}]


def labels(rows, classes):
    target = torch.randint(0, classes, (rows,))
    target[1::3] = -100
    target[0] = classes - 1
    return target


def pair(target, options, classes):
    """(fused, stock) as functions of the logits."""
    options = dict(options)
    weight = torch.rand(classes) + 0.1 if options.pop("weighted", False) else None

    def fused(logits):
        return ops.cross_entropy(logits, target, weight=weight, backend="triton", **options)

    def stock(logits):
        return F.cross_entropy(logits, target, weight=None if weight is None else weight.to(logits.dtype), **options)

    return fused, stock


# 8201: rows that begin at every remainder of the vector width, whole tiles between ragged ends;
# 4101: ends that together exceed a tile where 6 or 7 elements come before the first aligned one (at 4100 none do).
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("classes", [4101, 8201])
def test_matches_torch(classes, options):
    target = labels(9, classes)
    assert_same_math(*pair(target, options, classes), [torch.randn(9, classes) * 3], ["logits"])


@pytest.mark.parametrize("classes", [50257])
def test_vocabularies_that_no_vector_divides(classes):
    target = labels(3, classes)
    assert_same_math(*pair(target, {}, classes), [torch.randn(3, classes).bfloat16()], ["logits"])


# The interpreter's memory check would stop a read outside.
@pytest.mark.parametrize("label", [11, -1, 2**40])
def test_a_label_out_of_range_reads_nothing_and_gives_nan(label):
    logits, target = torch.randn(2, 11, requires_grad=True), torch.tensor([3, label])
    for weight in (None, torch.ones(11)):
        loss = ops.cross_entropy(logits, target, weight=weight, reduction="none", backend="triton")
        assert loss.isnan().tolist() == [False, True]
        torch.autograd.grad(loss.sum(), logits)


def test_bytes_moved_are_the_minimum(moves_at_most):
    logits = torch.randn(8, 30522).bfloat16().requires_grad_()
    target = torch.arange(8)
    with traffic() as forward:
        loss = ops.cross_entropy(logits, target, backend="triton")
    with traffic() as backward:
        torch.autograd.grad(loss, logits)
    moves_at_most("cross_entropy forward", forward, logits.nbytes)
    moves_at_most("cross_entropy backward", backward, 2 * logits.nbytes)
