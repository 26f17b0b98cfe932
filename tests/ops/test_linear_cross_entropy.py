"""ops.linear_cross_entropy against linear + cross_entropy: values, gradients, options, autograd's corners, memory."""

import importlib
import os
import subprocess
import sys
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from fused import BACKENDS, FUSED, INTERPRETED, cpp_only, either, reference_only
from hypothesis import given, settings
from oracle import DTYPES, SWEEP_SLACK, assert_same_math
from torch.library import opcheck

from fasttune import ops
from fasttune.ops import _linear_chunks as implementation
from fasttune.ops import linear_cross_entropy as module_function

OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1, "weighted": True},
    {"label_smoothing": 0.1, "weighted": True, "reduction": "none"},
    {"normalizer": 7.0},
    {"normalizer": torch.tensor(7), "reduction": "sum"},
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


CHUNK = 4


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of few rows, so that small problems take several."""
    if INTERPRETED:
        kernel = importlib.import_module("fasttune.kernels.linear_chunks")
        monkeypatch.setattr(kernel, "chunk_rows", lambda rows, row_bytes: 15)
    monkeypatch.setattr(implementation, "ENOUGH_ROWS", CHUNK)
    monkeypatch.setattr(implementation, "ENOUGH_BYTES", 1)


def problem(rows, features, classes, ignored=0.3, dtype=torch.float32):
    """input, weight, bias, target; logits of the size that a trained head has."""
    tensors = torch.randn(rows, features), torch.randn(classes, features) / features**0.5, torch.randn(classes)
    target = torch.randint(0, classes, (rows,))
    if rows > 1:
        target[torch.rand(rows) < ignored] = -100
        target[0] = classes - 1
    return *(tensor.to(dtype) for tensor in tensors), target


def pair(target, options, classes, backend=FUSED, stock_rows=None):
    """stock_rows: stock multiplies so many rows at a time. The vendor's product of a few rows adds up in sequence where
    a larger one goes by blocks: ten times the error on a CPU with AVX2, so both sides need the same number of rows."""
    options = dict(options)
    weight = torch.rand(classes) + 0.1 if options.pop("weighted", False) else None

    def fused(x, linear_weight, bias=None):
        return ops.linear_cross_entropy(
            x, linear_weight, target, linear_bias=bias, weight=weight, backend=backend, **options
        )

    def stock(x, linear_weight, bias=None):
        rest = {name: value for name, value in options.items() if name != "normalizer"}
        if "normalizer" in options:
            rest["reduction"] = "sum"
        cast = None if weight is None else weight.to(x.dtype)
        pieces = x.split(stock_rows or max(1, x.shape[0]))
        logits = torch.cat([F.linear(piece, linear_weight, bias) for piece in pieces])
        loss = F.cross_entropy(logits, target, weight=cast, **rest)
        return loss / options["normalizer"] if "normalizer" in options else loss

    return fused, stock


def reordered(stock, order, x, weight, *bias):
    """The same function with the features in another order, so with other roundings of every logit."""
    return stock(x[:, order], weight[:, order], *bias)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_matches_torch(isa, small_chunks, options, bias):
    *tensors, target = problem(37, 192, 1000)  # as wide as in test_vocabularies
    names = ["input", "weight", "bias"][: 2 + bias]
    fused, stock = pair(target, options, 1000, stock_rows=CHUNK)
    again = [partial(reordered, stock, torch.randperm(192)) for _ in range(3)]
    assert_same_math(fused, stock, tensors[: 2 + bias], names, again=again)


# 2: a binary head; 30522 and 50257: BERT's and GPT-2's, no multiples of 8, in one chunk and in several.
@pytest.mark.parametrize(
    ("rows", "classes"),
    either([(1, 2), (33, 2), (5, 30522), (1, 50257), (300, 50257)], [(1, 2), (33, 2), (5, 30522), (1, 50257)]),
)
def test_vocabularies(rows, classes):
    # Wide enough that the largest error of a row's gradient is typical: of 16 numbers it was now and then a third.
    x, weight, _, target = problem(rows, 192, classes, ignored=0.05)
    assert_same_math(*pair(target, {}, classes), [x, weight], ["input", "weight"])


@pytest.mark.parametrize("native", either([False, True], [True]), ids=["float32", "native"][either(0, 1) :])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_matches_torch_in_low_precision(isa, small_chunks, monkeypatch, dtype, native):
    """Both ways of the C++ library: in float32, converting the weight by blocks, and in bfloat16 where it is native."""
    monkeypatch.setattr(implementation, "_native_bfloat16", lambda: native)
    monkeypatch.setattr(implementation, "WEIGHT_BLOCK_BYTES", 24 * 4 * 100)
    *tensors, target = problem(19, 24, 259, dtype=dtype)
    for options in ({}, {"reduction": "none", "label_smoothing": 0.1}):
        assert_same_math(*pair(target, options, 259), tensors, ["input", "weight", "bias"])


@cpp_only
def test_weight_gradient_adds_up_in_float32(small_chunks, monkeypatch):
    """300 chunks of bfloat16 add up as one product would: a bfloat16 accumulator would be off by whole percents."""
    x, weight, _, target = problem(1200, 8, 16, ignored=0.0, dtype=torch.bfloat16)
    fused, stock = pair(target, {"reduction": "sum"}, 16)
    for native in (False, True):
        monkeypatch.setattr(implementation, "_native_bfloat16", lambda native=native: native)
        assert_same_math(fused, stock, [x, weight], ["input", "weight"])


def test_float32_weights_under_low_precision_inputs(small_chunks, monkeypatch):
    x, weight, bias, target = problem(9, 24, 259)
    for native in (False, True):
        monkeypatch.setattr(implementation, "_native_bfloat16", lambda native=native: native)
        leaves = [tensor.clone().requires_grad_() for tensor in (x.bfloat16(), weight, bias)]
        loss = ops.linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2])
        loss.backward()
        assert [leaf.grad.dtype for leaf in leaves] == [torch.bfloat16, torch.float32, torch.float32]
        exact = [tensor.detach().clone().requires_grad_() for tensor in leaves]
        F.cross_entropy(F.linear(exact[0].float(), exact[1], exact[2]), target).backward()
        for ours, truth in zip(leaves, exact, strict=True):
            torch.testing.assert_close(ours.grad.float(), truth.grad.float(), rtol=0.02, atol=1e-3)


# From 8 rows and 16 features on, the largest error says something: with fewer, stock is often right by luck.
@settings(max_examples=either(30, 8), deadline=None, derandomize=True)
@given(
    rows=st.integers(8, 40),
    features=st.integers(16, 40),
    classes=st.integers(2, 300),
    ignored=st.sampled_from([0.0, 0.4, 0.95]),
    options=st.sampled_from(OPTIONS),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_options(rows, features, classes, ignored, options, bias, seed):
    torch.manual_seed(seed)
    *tensors, target = problem(rows, features, classes, ignored)
    names = ["input", "weight", "bias"][: 2 + bias]
    assert_same_math(*pair(target, options, classes), tensors[: 2 + bias], names, slack=SWEEP_SLACK)


def test_leading_dimensions_strides_and_integer_types():
    x, weight, bias, target = problem(12, 10, 33)
    expected = F.cross_entropy(F.linear(x, weight, bias), target)
    wide = torch.zeros(3, 4, 17)
    wide[..., 2:12] = x.view(3, 4, 10)
    for strided in (x.view(3, 4, 10), wide[..., 2:12]):
        loss = ops.linear_cross_entropy(strided, weight, target.view(3, 4).int(), linear_bias=bias)
        torch.testing.assert_close(loss, expected)
    columns = weight.t().contiguous().t()
    torch.testing.assert_close(ops.linear_cross_entropy(x, columns, target, linear_bias=bias), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_row_counts(backend):
    x, weight, bias, _ = problem(3, 6, 11)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    target = torch.full((3,), -100)
    for smoothing in (0.0, 0.1):
        options = {"linear_bias": bias, "label_smoothing": smoothing, "backend": backend}
        loss = ops.linear_cross_entropy(x, weight, target, **options)
        assert loss.isnan()
        assert all(grad.count_nonzero() == 0 for grad in torch.autograd.grad(loss, leaves))
        assert ops.linear_cross_entropy(x, weight, target, reduction="sum", **options) == 0
        losses = ops.linear_cross_entropy(x, weight, target, reduction="none", **options)
        assert losses.count_nonzero() == 0
        assert all(grad.count_nonzero() == 0 for grad in torch.autograd.grad(losses.sum(), leaves))
    empty = ops.linear_cross_entropy(x[:0], weight, target[:0], reduction="sum", backend=backend)
    assert empty == 0
    assert torch.autograd.grad(empty, weight)[0].count_nonzero() == 0


def test_backward_never_once_twice_and_scaled():
    x, weight, bias, target = problem(9, 8, 40)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]

    def loss():
        return ops.linear_cross_entropy(x, weight, target, linear_bias=bias)

    loss()  # backward never comes
    expected = torch.autograd.grad(F.cross_entropy(F.linear(x, weight, bias), target), leaves)
    once = torch.autograd.grad(loss(), leaves)
    kept = loss()
    first = torch.autograd.grad(kept, leaves, retain_graph=True)
    for grad in first:
        grad.mul_(100)  # the caller may do what they like with their gradients
    second = torch.autograd.grad(kept, leaves, torch.tensor(-2.0), retain_graph=True)
    third = torch.autograd.grad(kept, leaves, torch.tensor(0.5))
    for truth, one, two, three in zip(expected, once, second, third, strict=True):
        torch.testing.assert_close(one, truth)
        assert torch.equal(two, -2 * one)
        assert torch.equal(three, 0.5 * one)
    with pytest.raises(RuntimeError, match="second time"):
        kept.backward()


def test_accumulated_gradients_do_not_share_memory():
    x, weight, _, target = problem(9, 8, 40)
    weight.requires_grad_()
    kept = ops.linear_cross_entropy(x, weight, target)
    kept.backward(retain_graph=True)
    once = weight.grad.clone()
    weight.grad.zero_()
    kept.backward(retain_graph=True)
    assert torch.equal(weight.grad, once)
    weight.grad.mul_(3)
    kept.backward()
    torch.testing.assert_close(weight.grad, 4 * once)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_frozen_parameters_cost_no_product(monkeypatch, needs):
    tensors = problem(9, 8, 40)
    leaves = [tensor.requires_grad_(need) for tensor, need in zip(tensors[:3], needs, strict=True)]
    x, weight, bias = leaves
    loss = F.cross_entropy(F.linear(x, weight, bias), tensors[3])
    expected = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])
    products = []
    for name in ("mm", "addmm"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=original, **k: products.append(1) or f(*a, **k))
    loss = ops.linear_cross_entropy(x, weight, tensors[3], linear_bias=bias)
    grads = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])
    assert len(products) == 1 + needs[0] + needs[1]
    for ours, truth in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, truth)
    products.clear()
    with torch.no_grad():
        ops.linear_cross_entropy(x, weight, tensors[3], linear_bias=bias)
    assert len(products) == 1


@cpp_only
def test_hopeless_classes_leave_no_subnormal_numbers():
    """They would slow the products down by an order of magnitude and more."""
    x, weight, bias, target = problem(9, 8, 4000)
    x.requires_grad_()
    weight.requires_grad_()
    loss = ops.linear_cross_entropy(x, weight, target, linear_bias=20 * bias)
    for grad in torch.autograd.grad(loss, (x, weight)):
        assert ((grad == 0) | (grad.abs() >= torch.finfo(torch.float32).tiny)).all()


@cpp_only
def test_ignored_rows_are_dropped_before_the_product():
    x, weight, _, target = problem(50, 8, 40, ignored=0.8)
    x[target == -100] = torch.nan
    x.requires_grad_()
    weight.requires_grad_()
    ops.linear_cross_entropy(x, weight, target).backward()
    assert x.grad.isfinite().all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_autocast_as_linear_would(dtype):
    x, weight, bias, target = problem(30, 24, 259)
    results = []
    for function in pair(target, {}, 259):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        with torch.autocast("cpu", dtype):
            loss = function(*leaves)
        loss.backward()
        results.append([loss, *(leaf.grad for leaf in leaves)])
    for ours, stock in zip(*results, strict=True):
        assert ours.dtype == stock.dtype == torch.float32
        torch.testing.assert_close(ours, stock, rtol=0.05, atol=torch.finfo(dtype).eps)


def test_loss_scaling_saves_float16_from_underflow():
    """A factor that comes with the upstream gradient, as from GradScaler, acts before the rounding to float16."""
    x, weight, _, target = problem(64, 8, 4000, ignored=0.0, dtype=torch.float16)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    loss = ops.linear_cross_entropy(x, weight, target)
    scaled = torch.autograd.grad(loss.float() * 1024, leaves)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = torch.autograd.grad(F.cross_entropy(F.linear(*exact_leaves), target), exact_leaves)
    for ours, truth in zip(scaled, exact, strict=True):
        error = (ours.double() - 1024 * truth).abs().max() / (1024 * truth).abs().max()
        assert error < 2 * torch.finfo(torch.float16).eps


def test_activation_checkpointing():
    x, weight, _, target = problem(9, 8, 40)
    weight.requires_grad_()
    expected = torch.autograd.grad(ops.linear_cross_entropy(x, weight, target), weight)[0]
    loss = torch.utils.checkpoint.checkpoint(
        lambda x, w: ops.linear_cross_entropy(x * 1, w * 1, target), x, weight, use_reentrant=False
    )
    assert torch.equal(torch.autograd.grad(loss, weight)[0], expected)


@reference_only
def test_torch_backend_in_float64():
    x, weight, bias, target = (
        tensor.double() if tensor.is_floating_point() else tensor for tensor in problem(4, 3, 5, 0.3)
    )
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    for options in OPTIONS:
        fused, stock = pair(target, options, 5, backend="torch")
        assert torch.autograd.gradcheck(fused, leaves)
        torch.testing.assert_close(fused(*leaves), stock(*leaves))


@cpp_only
def test_threads_do_not_change_a_bit(isa, small_chunks):
    """The kernel's part: sums and bias gradients. (Matrix products are torch's and fixed per thread count.)"""
    x, weight, bias, target = problem(41, 1, 3001)
    weight.requires_grad_()
    bias.requires_grad_()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        loss = ops.linear_cross_entropy(x, weight, target, linear_bias=bias, label_smoothing=0.1)
        results.append((loss.detach(), *torch.autograd.grad(loss, [bias])))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_opcheck(small_chunks):
    x, weight, bias, target = problem(9, 6, 40)
    options = (torch.tensor(3.0), 1.0, -100, 0.1)
    for grad in (False, True):
        for reduction in (0, 1, 2):
            leaves = [tensor.detach().clone().requires_grad_(grad) for tensor in (x, weight, bias)]
            arguments = (leaves[0], leaves[1], target, leaves[2], torch.rand(40), *options, reduction, grad, grad, grad)
            opcheck(torch.ops.fasttune.linear_cross_entropy.default, (*arguments, FUSED))
    arguments = (torch.rand(9), x, weight, target, bias, None, -100, 0.1, True, False, True, FUSED)
    opcheck(torch.ops.fasttune.linear_cross_entropy_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend):
    x, weight, bias, target = problem(12, 6, 40)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    for options in ({}, {"reduction": "none"}, {"normalizer": torch.tensor(3)}):

        def function(x, weight, bias, options=options):
            return ops.linear_cross_entropy(
                x.view(3, 4, 6), weight, target.view(3, 4), linear_bias=bias, backend=backend, **options
            )

        loss, expected = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves), function(*leaves)
        torch.testing.assert_close(loss, expected)
        compiled, eager = (torch.autograd.grad(out.sum() * 2, leaves) for out in (loss, expected))
        torch.testing.assert_close(compiled, eager)


MEMORY = """
import re, torch
from fasttune import ops

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

torch.set_num_threads(2)
x, weight = torch.randn(640, 256, requires_grad=True), (torch.randn(50257, 256) * 0.02).requires_grad_()
target = torch.randint(0, 50257, (640,))
torch.mm(x.detach()[:256], weight.detach().t())  # the matrix library's own workspace, which any large product leaves
ops.linear_cross_entropy(x[:2], weight[:2048], target[:2] % 2048)
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = status("VmRSS")
ops.linear_cross_entropy(x, weight, target).backward()
print(status("VmHWM") - before - x.nbytes - weight.nbytes)
"""


@cpp_only
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory counter")
def test_extra_memory_stays_below_64_mb():
    """Beyond the gradients, on GPT-2's vocabulary; the logits alone would take 129 MB."""
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(result.stdout) <= 64e6


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_is_named(backend):
    x, weight, bias, _ = problem(6, 8, 5)
    batch, target = x.view(2, 3, 8), torch.zeros(2, 3, dtype=torch.long)

    def call(x=batch, weight=weight, target=target, **options):
        return ops.linear_cross_entropy(x, weight, target, backend=backend, **options)

    wrong = target.clone()
    wrong[1, 0] = 7
    with pytest.raises(IndexError, match=r"target at position \(1, 0\) is 7; expected a value from 0 to 4 or -100"):
        call(target=wrong)
    if backend != "triton":  # a GPU's tensors are not read back: there the loss is NaN
        with pytest.raises(IndexError, match=r"target at position 3 is 7"):
            call(x=x, target=wrong.view(-1))
    with pytest.raises(ValueError, match=r"linear_weight is float32 of shape \(5, 4\).*expected shapes"):
        call(weight=weight[:, :4])
    with pytest.raises(ValueError, match=r"linear_bias is float32 of shape \(4,\)"):
        call(linear_bias=bias[:4])
    with pytest.raises(TypeError, match="linear_weight is float16.*expected torch.float32"):
        call(weight=weight.half())
    with pytest.raises(ValueError, match=r"target is int64 of shape \(3,\)"):
        call(target=target[0])
    with pytest.raises(ValueError, match="normalizer divides a sum"):
        call(normalizer=2.0, reduction="none")
    with pytest.raises(ValueError, match=r"normalizer is float32 of shape \(2,\)"):
        call(normalizer=torch.ones(2))
    with pytest.raises(ValueError, match="reduction is 'avg'"):
        call(reduction="avg")
    assert module_function is ops.linear_cross_entropy
