"""The Triton cross-entropy against stock torch in the tested dtype and in float64, and the bytes it moves."""

import pytest
import torch
import torch.nn.functional as F
from interpreter.memory import traffic
from oracle import DTYPES, assert_same_math

from fasttune import ops

OPTIONS = [
    {},
    {"reduction": "sum"},
    {"label_smoothing": 0.1, "reduction": "none", "weighted": True},
    {"label_smoothing": 0.1},
    {"weighted": True},
]
# numpy warns where the interpreter makes a NaN that is meant.
MAKES_NAN = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")


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


# 2: a binary head; 8201: rows that begin at every remainder of the vector width, whole tiles between ragged ends;
# 4100: ends that together exceed a tile where the first aligned element comes late.
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("classes", [2, 4100, 8201])
def test_matches_torch(classes, options):
    target = labels(9, classes)
    assert_same_math(*pair(target, options, classes), [torch.randn(9, classes) * 3], ["logits"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_torch_in_every_dtype(dtype):
    target = labels(37, 259)
    logits = (torch.randn(37, 259) * 3).to(dtype)
    assert_same_math(*pair(target, {}, 259), [logits], ["logits"])
    assert_same_math(*pair(target, {"reduction": "none", "label_smoothing": 0.2}, 259), [logits], ["logits"])


@pytest.mark.parametrize("classes", [30522, 50257])
def test_vocabularies_that_no_vector_divides(classes):
    target = labels(3, classes)
    assert_same_math(*pair(target, {}, classes), [torch.randn(3, classes).bfloat16()], ["logits"])


def test_rows_may_lie_apart_and_elements_too():
    wide, target = torch.randn(6, 40), labels(6, 33)
    for logits in (wide[:, :33], wide[:, 4:37], torch.randn(33, 6).t()):
        assert_same_math(*pair(target, {}, 33), [logits], ["logits"])
        expected = F.cross_entropy(logits, target)
        torch.testing.assert_close(ops.cross_entropy(logits, target, backend="triton"), expected)


@MAKES_NAN
def test_extreme_logits():
    logits = torch.randn(5, 2050)
    logits[0, :2000] = -torch.inf
    logits[1] = 1e30
    logits[2, 5] = 1e4
    logits[3, 17] = torch.nan
    logits[4] = -torch.inf
    target = torch.full((1,), 2040)
    for row in range(5):
        ours, stock = (logits[row : row + 1].clone().requires_grad_() for _ in range(2))
        loss, expected = ops.cross_entropy(ours, target, backend="triton"), F.cross_entropy(stock, target)
        loss.backward(), expected.backward()
        torch.testing.assert_close(loss, expected, equal_nan=True)
        torch.testing.assert_close(ours.grad, stock.grad, equal_nan=True)


@MAKES_NAN
def test_no_row_counts():
    logits, target = torch.randn(3, 11, requires_grad=True), torch.full((3,), -100)
    loss = ops.cross_entropy(logits, target, backend="triton")
    assert loss.isnan()
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()
    assert ops.cross_entropy(logits, target, reduction="sum", backend="triton") == 0
    assert ops.cross_entropy(torch.randn(0, 11), target[:0], backend="triton").isnan()


# The interpreter's memory check would stop a read outside.
@pytest.mark.parametrize("label", [11, -1, 2**40])
def test_a_label_out_of_range_reads_nothing_and_gives_nan(label):
    logits, target = torch.randn(2, 11, requires_grad=True), torch.tensor([3, label])
    for weight in (None, torch.ones(11)):
        loss = ops.cross_entropy(logits, target, weight=weight, reduction="none", backend="triton")
        assert loss.isnan().tolist() == [False, True]
        torch.autograd.grad(loss.sum(), logits)


def test_bytes_moved_are_the_minimum():
    logits = torch.randn(8, 30522).bfloat16().requires_grad_()
    target = torch.arange(8)
    with traffic() as forward:
        loss = ops.cross_entropy(logits, target, backend="triton")
    with traffic() as backward:
        torch.autograd.grad(loss, logits)
    print(f"cross_entropy: forward {forward.total() / logits.nbytes:.3f} x minimum", end=", ")
    print(f"backward {backward.total() / (2 * logits.nbytes):.3f} x minimum")
    assert forward.total() <= 1.05 * logits.nbytes
    assert backward.total() <= 1.05 * 2 * logits.nbytes
