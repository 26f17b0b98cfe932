"""ops.cross_entropy against torch.nn.functional.cross_entropy: values, gradients, options, bad input, tracing."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from fused import BACKENDS, FUSED, cpp_only, either, reference_only
from hypothesis import given, settings
from oracle import DTYPES, SWEEP_SLACK, assert_parity, assert_same_math
from torch.library import opcheck

from fasttune import ops
from fasttune.ops.cross_entropy import _cross_entropy, _cross_entropy_backward

# 2: a binary head; 7 and 1000: less than a block, no multiple of the vector width; 30522 and 50257: BERT's, GPT-2's.
CLASSES = either((2, 7, 1000, 30522, 50257), (2, 7, 1000, 30522))
OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.1, "reduction": "none", "weighted": True},
    {"weighted": True},
    {"label_smoothing": 1.0, "reduction": "sum"},
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def labels(rows, classes, ignored=0.3, ignore_index=-100):
    target = torch.randint(0, classes, (rows,))
    if rows > 1:
        target[torch.rand(rows) < ignored] = ignore_index
        target[0] = classes - 1
    return target


def pair(target, options, classes):
    """(fused, stock) as functions of the logits; stock computes in the logits' dtype."""
    options = dict(options)
    weight = torch.rand(classes) + 0.1 if options.pop("weighted", False) else None

    def fused(logits):
        return ops.cross_entropy(logits, target, weight=weight, backend=FUSED, **options)

    def stock(logits):
        return F.cross_entropy(logits, target, weight=None if weight is None else weight.to(logits.dtype), **options)

    return fused, stock


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("linear", [False, True])
def test_without_smoothing_a_weight_of_no_label_does_not_count(isa, linear, value):
    target, weight = torch.tensor([1, 4, -100, 4]), torch.rand(9) + 0.1
    weight[6] = value

    def fused(logits):
        if linear:
            return ops.linear_cross_entropy(logits, torch.eye(9), target, weight=weight, backend=FUSED)
        return ops.cross_entropy(logits, target, weight=weight, backend=FUSED)

    assert_same_math(fused, lambda x: F.cross_entropy(x, target, weight.to(x.dtype)), [torch.randn(4, 9)], ["logits"])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_matches_torch(isa, classes, options):
    target = labels(5, classes)
    assert_same_math(*pair(target, options, classes), [torch.randn(5, classes) * 3], ["logits"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 37])
def test_matches_torch_in_every_dtype(isa, dtype, rows):
    target = labels(rows, 259)
    logits = (torch.randn(rows, 259) * 3).to(dtype)
    slack = SWEEP_SLACK if rows == 1 else 1.0  # stock was once right to 0.2 ulp in all of a row
    for options in ({}, {"reduction": "none", "label_smoothing": 0.2}):
        assert_same_math(*pair(target, options, 259), [logits], ["logits"], slack)


# Few elements make stock right by luck, which no budget derived from its error can allow for: at least 4 x 20.
@settings(max_examples=either(40, 8), deadline=None, derandomize=True)
@given(
    rows=st.integers(4, 9),
    classes=st.integers(20, 2100),
    smoothing=st.sampled_from([0.0, 0.3]),
    weighted=st.booleans(),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_options(rows, classes, smoothing, weighted, reduction, scale, seed):
    torch.manual_seed(seed)
    target = labels(rows, classes, ignored=0.5)
    options = {"label_smoothing": smoothing, "weighted": weighted, "reduction": reduction}
    assert_same_math(
        *pair(target, options, classes), [torch.randn(rows, classes) * scale], ["logits"], slack=SWEEP_SLACK
    )


def test_leading_dimensions_strides_and_integer_types():
    torch.manual_seed(0)
    wide = torch.randn(2, 3, 40)
    target = torch.randint(0, 33, (2, 3), dtype=torch.int32)
    for logits in (wide[..., :33], wide[..., 4:37], wide.transpose(0, 1)[..., :33].transpose(0, 1)):
        expected = F.cross_entropy(logits.reshape(-1, 33), target.view(-1).long(), reduction="none").view(2, 3)
        torch.testing.assert_close(ops.cross_entropy(logits, target, reduction="none"), expected)
    single = ops.cross_entropy(torch.randn(33), torch.tensor(4), reduction="none")
    assert single.shape == ()


def test_extreme_logits():
    """Masked classes at -inf, huge logits and NaN behave as in torch."""
    logits = torch.randn(6, 2050)
    logits[0, :2000] = -torch.inf
    logits[1] = 1e30
    logits[2, 5] = 1e4
    logits[3, 17] = torch.nan
    logits[4] = -torch.inf
    target = torch.full((6,), 2040)
    for row in range(6):
        ours, stock = (logits[row : row + 1].clone().requires_grad_() for _ in range(2))
        loss, expected = ops.cross_entropy(ours, target[:1]), F.cross_entropy(stock, target[:1])
        loss.backward(), expected.backward()
        torch.testing.assert_close(loss, expected, equal_nan=True)
        torch.testing.assert_close(ours.grad, stock.grad, equal_nan=True)


def test_no_row_counts():
    logits = torch.randn(3, 11, requires_grad=True)
    target = torch.full((3,), -100)
    for smoothing in (0.0, 0.1):
        loss = ops.cross_entropy(logits, target, label_smoothing=smoothing)
        assert loss.isnan()
        assert torch.autograd.grad(loss, logits)[0].count_nonzero() == 0
        assert ops.cross_entropy(logits, target, label_smoothing=smoothing, reduction="sum") == 0
    assert ops.cross_entropy(torch.randn(0, 11), target[:0]).isnan()
    assert ops.cross_entropy(torch.randn(0, 11), target[:0], reduction="none").shape == (0,)


def test_another_ignore_index_may_be_a_class():
    logits, target = torch.randn(4, 5), torch.tensor([0, 3, 0, 1])
    expected = F.cross_entropy(logits, target, ignore_index=0)
    torch.testing.assert_close(ops.cross_entropy(logits, target, ignore_index=0), expected)


def test_twice_backward_and_upstream_leave_the_inputs_alone():
    logits, target = torch.randn(4, 300, requires_grad=True), labels(4, 300)
    before = logits.detach().clone()
    loss = ops.cross_entropy(logits, target)
    (first,) = torch.autograd.grad(loss, logits, torch.tensor(3.0), retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, kept)
    torch.testing.assert_close(first, 3 * second)
    assert torch.equal(logits.detach(), before)


def test_autocast_gives_a_float32_loss():
    logits, target = torch.randn(4, 50, dtype=torch.bfloat16, requires_grad=True), labels(4, 50)
    with torch.autocast("cpu", torch.bfloat16):
        ours, stock = ops.cross_entropy(logits, target), F.cross_entropy(logits, target)
    assert ours.dtype == stock.dtype == torch.float32
    torch.testing.assert_close(ours, stock)


@reference_only
def test_torch_backend_in_float64():
    target = torch.tensor([1, -100, 4])
    weight = torch.rand(5, dtype=torch.float64)
    for options in ({}, {"label_smoothing": 0.2, "weight": weight}, {"reduction": "none", "weight": weight}):
        logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, o=options: ops.cross_entropy(x, target, backend="torch", **o), logits)
        ours, stock = ops.cross_entropy(logits, target, **options), F.cross_entropy(logits, target, **options)
        torch.testing.assert_close(ours, stock)


def test_few_classes_with_every_option():
    for options in OPTIONS:
        fused, stock = pair(labels(6, 40), options, 40)
        logits = torch.randn(6, 40)
        assert_parity(fused(logits), stock(logits), stock(logits.double()))


@cpp_only
def test_threads_do_not_change_a_bit(isa):
    logits, target = torch.randn(67, 3001, requires_grad=True), labels(67, 3001)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        loss = ops.cross_entropy(logits, target, label_smoothing=0.1)
        results.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_opcheck():
    target = torch.tensor([3, -100, 0])
    for logits in (torch.randn(3, 70), torch.randn(3, 70, requires_grad=True)):
        for reduction in (0, 1, 2):
            opcheck(torch.ops.fasttune.cross_entropy.default, (logits, target, None, -100, 0.1, reduction, FUSED))
    arguments = (torch.tensor(1.0), torch.randn(3, 70), target, torch.rand(70), torch.rand(3, 2), torch.tensor(2.0))
    opcheck(torch.ops.fasttune.cross_entropy_backward.default, (*arguments, -100, 0.1, 1, FUSED))
    assert _cross_entropy.public == 1
    assert _cross_entropy_backward.public == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend):
    logits, target = torch.randn(2, 4, 70, requires_grad=True), torch.randint(0, 70, (2, 4))
    for reduction in ("mean", "none"):

        def function(logits, reduction=reduction):
            return ops.cross_entropy(logits, target, reduction=reduction, label_smoothing=0.1, backend=backend)

        loss, expected = torch.compile(function, fullgraph=True, backend="aot_eager")(logits), function(logits)
        torch.testing.assert_close(loss, expected)
        grads = [torch.autograd.grad(out.sum() * 2, logits)[0] for out in (loss, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_is_named(backend):
    logits, target = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)

    def call(logits=logits, target=target, **options):
        return ops.cross_entropy(logits, target, backend=backend, **options)

    wrong = target.clone()
    wrong[1, 2] = 5
    with pytest.raises(IndexError, match=r"target at position \(1, 2\) is 5; expected a value from 0 to 4 or -100"):
        call(target=wrong)
    if backend != "triton":  # a GPU's tensors are not read back: there the loss is NaN
        with pytest.raises(IndexError, match=r"target at position 4 is -1;"):
            call(torch.randn(6, 5), torch.tensor([0, 0, 0, 0, -1, 9]))
    with pytest.raises(TypeError, match="target is float32 .*expected integers"):
        call(target=target.float())
    with pytest.raises(ValueError, match=r"target is int64 of shape \(2,\) on cpu; expected shape \(2, 3\)"):
        call(target=target[:, 0])
    with pytest.raises(ValueError, match=r"weight is float32 of shape \(4,\) on cpu; expected shape \(5,\)"):
        call(weight=torch.ones(4))
    with pytest.raises(ValueError, match="label_smoothing is 1.5"):
        call(label_smoothing=1.5)
    with pytest.raises(ValueError, match="reduction is 'avg'; expected one of none, mean, sum"):
        call(reduction="avg")
    with pytest.raises(TypeError, match="logits is int64"):
        call(logits=target)
