"""nn.CrossEntropyLoss and nn.LinearCrossEntropyLoss against torch.nn's."""

import pytest
import torch
from nn_checks import assert_module_parity, assert_same_keys
from oracle import DTYPES
from torch import nn

from fasttune import nn as fnn

STOCK_LINEAR = getattr(nn, "LinearCrossEntropyLoss", None)
needs_stock_linear = pytest.mark.skipif(STOCK_LINEAR is None, reason="torch has no nn.LinearCrossEntropyLoss")

OPTIONS = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "weight": torch.linspace(0.5, 2, 11)},
    {"ignore_index": 3, "weight": torch.linspace(0.5, 2, 11), "label_smoothing": 0.2},
]


def targets(*shape, ignored=-100):
    target = torch.randint(0, 11, shape)
    target.view(-1)[::4] = ignored
    return target


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "defaults")
def test_cross_entropy_is_torchs(dtype, options):
    if dtype != torch.float32:
        options = {name: value for name, value in options.items() if name != "weight"}  # stock wants weight in dtype
    ours, stock = fnn.CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)
    assert_same_keys(ours, stock)
    assert_module_parity(
        ours, stock, [torch.randn(9, 11) * 3, targets(9, ignored=options.get("ignore_index", -100))], dtype
    )


@pytest.mark.parametrize(
    ("logits", "target"),
    [
        (torch.randn(11), torch.tensor(4)),
        (torch.randn(2, 11, 3), torch.randint(0, 11, (2, 3))),
        (torch.randn(5, 11), torch.rand(5, 11).softmax(1)),
        (torch.randn(11), torch.rand(11).softmax(0)),
    ],
    ids=["one row", "more dimensions", "probabilities", "one row of probabilities"],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy_takes_every_form_of_torchs(logits, target, reduction):
    ours, stock = fnn.CrossEntropyLoss(reduction=reduction), nn.CrossEntropyLoss(reduction=reduction)
    torch.testing.assert_close(ours(logits, target), stock(logits, target))


@needs_stock_linear
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "defaults")
def test_linear_cross_entropy_is_torchs(options, bias):
    ours, stock = (kind(6, 11, bias=bias, **options) for kind in (fnn.LinearCrossEntropyLoss, STOCK_LINEAR))
    assert_same_keys(ours, stock)
    target = targets(9, ignored=options.get("ignore_index", -100))
    assert_module_parity(ours, stock, [torch.randn(9, 6), target])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_cross_entropy_in_half_precision(dtype):
    class Composed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 11, bias=False)

        def forward(self, x, target):
            return nn.functional.cross_entropy(self.linear(x), target)

    assert_module_parity(fnn.LinearCrossEntropyLoss(16, 11), Composed(), [torch.randn(9, 16), targets(9)], dtype)


@needs_stock_linear
@pytest.mark.parametrize(
    ("arguments", "input", "target"),
    [
        ({}, torch.randn(6), torch.tensor(4)),
        ({}, torch.randn(5, 6), torch.rand(5, 11).softmax(1)),
        ({"out_features": (2, 3), "bias": True}, torch.randn(5, 6), torch.randint(0, 11, (5, 2, 3))),
        ({"options": "chunks"}, torch.randn(5, 6), torch.randint(0, 11, (5,))),
    ],
    ids=["one row", "probabilities", "out_features", "options"],
)
def test_linear_cross_entropy_takes_every_form_of_torchs(arguments, input, target):
    if "options" in arguments:
        arguments = {"options": nn.LinearCrossEntropyOptions()}
    ours, stock = fnn.LinearCrossEntropyLoss(6, 11, **arguments), STOCK_LINEAR(6, 11, **arguments)
    assert_same_keys(ours, stock)
    torch.testing.assert_close(ours(input, target), stock(input, target))


def test_normalizer_divides_the_sum():
    loss = fnn.LinearCrossEntropyLoss(6, 11)
    x, target = torch.randn(9, 6), targets(9)
    total = nn.functional.cross_entropy(loss.linear(x), target, reduction="sum")
    torch.testing.assert_close(loss(x, target, normalizer=torch.tensor(40)), total / 40)
    with pytest.raises(ValueError, match="normalizer goes with class indices"):
        loss(x, torch.rand(9, 11), normalizer=4)


def test_backward_may_come_twice():
    loss = fnn.LinearCrossEntropyLoss(6, 11)
    x = torch.randn(9, 6, requires_grad=True)
    out = loss(x, targets(9))
    first = torch.autograd.grad(out, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, x)[0])


def test_bad_input_is_named():
    for loss, x in (
        (fnn.CrossEntropyLoss(), torch.randn(3, 11)),
        (fnn.LinearCrossEntropyLoss(6, 11), torch.randn(3, 6)),
    ):
        with pytest.raises(IndexError, match="11"):
            loss(x, torch.tensor([0, 11, 2]))
    with pytest.raises(ValueError, match=r"weight has shape \(3,\); expected \(11,\)"):
        fnn.LinearCrossEntropyLoss(6, 11, weight=torch.ones(3))
    with pytest.raises(ValueError, match="label_smoothing is 2"):
        fnn.LinearCrossEntropyLoss(6, 11, label_smoothing=2)
    with pytest.raises(ValueError, match="reduction is 'max'"):
        fnn.LinearCrossEntropyLoss(6, 11, reduction="max")
