"""ops.linear_log_prob against linear, log_softmax and gather: values, gradients, options, autograd, memory."""

import importlib
import itertools
import os
import subprocess
import sys
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from fused import BACKENDS, FUSED, INTERPRETED, cpp_only, either, reference_only, triton_only
from hypothesis import given, settings
from oracle import DTYPES, SWEEP_SLACK, assert_parity, assert_same_math
from torch.library import opcheck

from fasttune import ops
from fasttune.ops import _linear_chunks as implementation

RESULTS = ("log_prob", "logsumexp", "entropy", "mean_logit")  # the differentiable ones
SUBSETS = [names for size in range(1, 5) for names in itertools.combinations(RESULTS, size)]
CHUNK = 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of few rows, so that small problems take several."""
    if INTERPRETED:
        kernel = importlib.import_module("fasttune.kernels.linear_chunks")
        monkeypatch.setattr(kernel, "chunk_rows", lambda rows, row_bytes: 15)
    monkeypatch.setattr(implementation, "ENOUGH_ROWS", CHUNK)
    monkeypatch.setattr(implementation, "ENOUGH_BYTES", 1)


def problem(rows, features, classes, ignored=0.3, dtype=torch.float32):
    """input, weight, bias, ids; logits of the size that a trained head has."""
    tensors = torch.randn(rows, features), torch.randn(classes, features) / features**0.5, torch.randn(classes)
    ids = torch.randint(0, classes, (rows,))
    if rows > 1:
        ids[torch.rand(rows) < ignored] = -100
        ids[0] = classes - 1
    return *(tensor.to(dtype) for tensor in tensors), ids


def stock_results(x, weight, bias, ids, scale=1.0, rows=None):
    """rows: stock multiplies so many rows at a time, see test_linear_cross_entropy.py."""
    pieces = x.split(rows or max(1, x.shape[0]))
    logits = torch.cat([F.linear(piece, weight, bias) for piece in pieces])
    logits = (logits if logits.dtype == torch.float64 else logits.float()) * scale
    counted = torch.ones(x.shape[:1], dtype=torch.bool) if ids is None else ids != -100
    log_p = torch.log_softmax(logits, -1)
    entropy = -(log_p.exp() * log_p.clamp_min(-1e5)).sum(-1)  # -inf would make it NaN
    found = {"logsumexp": logits.logsumexp(-1), "entropy": entropy, "mean_logit": logits.mean(-1)}
    if ids is not None:
        found["log_prob"] = log_p.gather(-1, ids.where(counted, 0)[:, None])[:, 0]
    return {name: result.where(counted, 0.0) for name, result in found.items()}


def pair(ids, names, scale=1.0, backend=FUSED, stock_rows=None):
    """The same results of both sides, one behind the other."""

    def fused(x, weight, bias=None):
        found = ops.linear_log_prob(x, weight, ids, linear_bias=bias, scale=scale, backend=backend)
        return torch.cat([getattr(found, name) for name in names])

    def stock(x, weight, bias=None):
        found = stock_results(x, weight, bias, ids, scale, stock_rows)
        return torch.cat([found[name] for name in names])

    return fused, stock


def reordered(stock, order, x, weight, *bias):
    """The same function with the features in another order, so with other roundings of every logit."""
    return stock(x[:, order], weight[:, order], *bias)


@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_every_subset_of_results(isa, small_chunks, names):
    """Of values and of upstream gradients: the others have none."""
    *tensors, ids = problem(37, 64, 1000)
    fused, stock = pair(ids, names, 1.3, stock_rows=CHUNK)
    again = [partial(reordered, stock, torch.randperm(64)) for _ in range(3)]
    # The mean's gradient is the same for every class: of one number stock is now and then right by luck.
    slack = SWEEP_SLACK if names == ("mean_logit",) else 1.0
    assert_same_math(fused, stock, tensors, ["input", "weight", "bias"], slack, again)


@pytest.mark.parametrize("names", [*((name,) for name in RESULTS), RESULTS], ids="-".join)
@pytest.mark.parametrize(("scale", "bias"), [(1.0, False), (0.25, True), (-2.0, True), (0.0, False), (5, False)])
def test_scales_with_and_without_bias(isa, scale, bias, names):
    *tensors, ids = problem(11, 48, 259)
    fused, stock = pair(ids, names, scale)
    again = [partial(reordered, stock, torch.randperm(48)) for _ in range(3)]
    assert_same_math(fused, stock, tensors[: 2 + bias], ["input", "weight", "bias"][: 2 + bias], again=again)


@pytest.mark.parametrize("names", [("entropy",), ("logsumexp", "mean_logit"), RESULTS[1:]], ids="-".join)
def test_without_ids_every_row_counts(isa, small_chunks, names):
    *tensors, _ = problem(19, 48, 259)
    fused, stock = pair(None, names, stock_rows=CHUNK)
    again = [partial(reordered, stock, torch.randperm(48)) for _ in range(3)]
    assert_same_math(fused, stock, tensors, ["input", "weight", "bias"], again=again)
    found = ops.linear_log_prob(tensors[0], tensors[1], None, backend=FUSED)
    assert found.log_prob is None
    assert torch.equal(found.top1, F.linear(*tensors[:2]).argmax(-1))


# 2: a binary head; 30522 and 50257: BERT's and GPT-2's, no multiples of 8, in one chunk and in several.
@pytest.mark.parametrize(
    ("rows", "classes"),
    either([(1, 2), (33, 2), (5, 30522), (1, 50257), (300, 50257)], [(1, 2), (33, 2), (5, 30522)]),
)
def test_vocabularies(rows, classes):
    x, weight, _, ids = problem(rows, 64, classes, ignored=0.05)
    for names in (("log_prob", "entropy"), ("mean_logit",)):
        assert_same_math(*pair(ids, names), [x, weight], ["input", "weight"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_class(backend):
    x, weight, bias, ids = problem(6, 8, 1)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    found = ops.linear_log_prob(x, weight, ids, linear_bias=bias, scale=0.5, backend=backend)
    counts = ids != -100
    logit = (0.5 * F.linear(x, weight, bias)[:, 0]).where(counts, 0.0)
    for name, expected in zip(RESULTS, (0 * logit, logit, 0 * logit, logit), strict=True):
        torch.testing.assert_close(getattr(found, name), expected)
    assert found.top1.count_nonzero() == 0
    for names in (("log_prob", "entropy"), ("logsumexp", "mean_logit")):
        total = sum(getattr(found, name).sum() for name in names)
        ours = torch.autograd.grad(total, leaves, retain_graph=True)
        for gradient, truth in zip(ours, torch.autograd.grad(logit.sum(), leaves, retain_graph=True), strict=True):
            torch.testing.assert_close(gradient, truth * (2 if "logsumexp" in names else 0))


@pytest.mark.parametrize("native", either([False, True], [True]), ids=["float32", "native"][either(0, 1) :])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_matches_torch_in_low_precision(isa, small_chunks, monkeypatch, dtype, native):
    """Both ways of the C++ library: in float32, converting the weight by blocks, and in bfloat16 where it is native."""
    monkeypatch.setattr(implementation, "_native_bfloat16", lambda: native)
    monkeypatch.setattr(implementation, "WEIGHT_BLOCK_BYTES", 24 * 4 * 100)
    *tensors, ids = problem(19, 24, 259, dtype=dtype)
    for names in (*((name,) for name in RESULTS), RESULTS):
        assert_same_low_precision(*pair(ids, names, 0.7), tensors)


def assert_same_low_precision(fused, stock, tensors):
    """assert_same_math, whose outputs here are float32 though the inputs are not."""
    upstream = torch.randn(stock(*tensors).shape)
    sides = []
    for function, dtype in ((fused, None), (stock, None), (stock, torch.float64)):
        leaves = [tensor.to(dtype or tensor.dtype).requires_grad_() for tensor in map(torch.clone, tensors)]
        out = function(*leaves)
        sides.append([out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))])
    eps = torch.finfo(tensors[0].dtype).eps
    for what, ours, theirs, exact in zip(("output", "input", "weight", "bias"), *sides, strict=True):
        assert ours.dtype == theirs.dtype
        # stock's float32 results come from 16-bit logits: as near as those are by luck is not asked for
        floor = eps * exact.abs().max()
        error = (ours.double() - exact).abs().max()
        assert error <= 2 * (theirs.double() - exact).abs().max() + floor, f"{what}: {error:.3g}"


def test_float32_weights_under_low_precision_inputs(small_chunks, monkeypatch):
    x, weight, bias, ids = problem(9, 24, 259)
    for native in (False, True):
        monkeypatch.setattr(implementation, "_native_bfloat16", lambda native=native: native)
        leaves = [tensor.clone().requires_grad_() for tensor in (x.bfloat16(), weight, bias)]
        found = ops.linear_log_prob(leaves[0], leaves[1], ids, linear_bias=leaves[2], backend=FUSED)
        assert {result.dtype for result in found[:4]} == {torch.float32}
        (found.log_prob + 0.1 * found.entropy).sum().backward()
        assert [leaf.grad.dtype for leaf in leaves] == [torch.bfloat16, torch.float32, torch.float32]
        exact = [tensor.detach().clone().requires_grad_() for tensor in leaves]
        truth = stock_results(exact[0].float(), exact[1], exact[2], ids)
        (truth["log_prob"] + 0.1 * truth["entropy"]).sum().backward()
        for ours, theirs in zip(leaves, exact, strict=True):
            torch.testing.assert_close(ours.grad.float(), theirs.grad.float(), rtol=0.02, atol=0.02)


# From 8 rows and 16 features on, the largest error says something: with fewer, stock is often right by luck.
@settings(max_examples=either(30, 8), deadline=None, derandomize=True)
@given(
    rows=st.integers(8, 40),
    features=st.integers(16, 40),
    classes=st.integers(2, 300),
    ignored=st.sampled_from([0.0, 0.4, 0.95]),
    scale=st.sampled_from([1.0, 0.3, 2.0]),
    names=st.sampled_from(SUBSETS),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_options(rows, features, classes, ignored, scale, names, bias, seed):
    torch.manual_seed(seed)
    *tensors, ids = problem(rows, features, classes, ignored)
    inputs = ["input", "weight", "bias"][: 2 + bias]
    assert_same_math(*pair(ids, names, scale), tensors[: 2 + bias], inputs, slack=SWEEP_SLACK)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_top1_is_the_first_of_equals(isa, backend, dtype):
    """Logits of a few whole numbers, of which every row's largest stands at several places; negative rows too."""
    classes = either(3000, 2 * 2048 + 5)
    logits = torch.randint(-9, -4, (6, classes)).float()
    logits[0, [2047, 2048, 2999]] = 3.0
    logits[1, -1] = 3.0
    logits[2, :] = -2.0
    logits[3, [17, 1024, 1025]] = torch.tensor([1.0, 2.0, 2.0])
    weight = logits.t().contiguous().to(dtype)  # row i of the identity picks column i
    found = ops.linear_log_prob(torch.eye(6).to(dtype), weight, None, scale=0.5, backend=backend)
    assert torch.equal(found.top1, logits.argmax(-1))
    assert found.top1.dtype == torch.int64
    assert not found.top1.requires_grad
    negated = ops.linear_log_prob(torch.eye(6).to(dtype), weight, None, scale=-1.0, backend=backend)
    assert torch.equal(negated.top1, logits.argmin(-1))


def test_leading_dimensions_strides_and_integer_types():
    x, weight, bias, ids = problem(12, 10, 33)
    expected = stock_results(x, weight, bias, ids)
    wide = torch.zeros(3, 4, 17)
    wide[..., 2:12] = x.view(3, 4, 10)
    columns = weight.t().contiguous().t()
    for strided in (x.view(3, 4, 10), wide[..., 2:12]):
        leaves = [strided.detach().requires_grad_(), columns.detach().requires_grad_()]
        found = ops.linear_log_prob(*leaves, ids.view(3, 4).int(), linear_bias=bias, backend=FUSED)
        for name in RESULTS:
            assert getattr(found, name).shape == (3, 4)
            torch.testing.assert_close(getattr(found, name).view(-1), expected[name])
        exact = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        truth = stock_results(exact[0].reshape(12, 10), exact[1], bias, ids)
        # an upstream gradient of stride 0, and one of stride 2
        spread = torch.rand(3, 8)[:, ::2]
        ours = torch.autograd.grad([found.log_prob.sum(), found.entropy], leaves, [torch.tensor(1.0), spread])
        theirs = torch.autograd.grad(
            [truth["log_prob"].sum(), truth["entropy"]], exact, [torch.tensor(1.0), spread.reshape(-1)]
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (1,), (2, 0), (0,)])
def test_few_rows_and_none(backend, shape):
    x, weight, bias, _ = problem(1, 6, 11)
    x = x[0].expand(*shape, 6).clone().requires_grad_()
    weight.requires_grad_()
    for ids in (torch.full(shape, 3), None):
        found = ops.linear_log_prob(x, weight, ids, linear_bias=bias, backend=backend)
        assert {result.shape for result in found if result is not None} == {torch.Size(shape)}
        dx, dweight = torch.autograd.grad(found.entropy.sum(), (x, weight))
        assert dx.shape == x.shape
        assert dweight.isfinite().all()
        assert dweight.any() == (x.numel() > 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_row_counts(backend):
    x, weight, bias, _ = problem(3, 6, 11)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    found = ops.linear_log_prob(x, weight, torch.full((3,), 5), linear_bias=bias, ignore_index=5, backend=backend)
    assert all(result.count_nonzero() == 0 for result in found)
    total = sum(result.sum() for result in found[:4])
    assert all(grad.count_nonzero() == 0 for grad in torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_reach_nothing(backend):
    """Not even what they hold, if it is no number; on the C++ backend they cost no product."""
    x, weight, bias, ids = problem(50, 8, 40, ignored=0.8)
    if backend != "triton":
        x[ids == -100] = torch.nan
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    found = ops.linear_log_prob(x, weight, ids, linear_bias=bias, backend=backend)
    assert all(result[ids == -100].count_nonzero() == 0 for result in found)
    dx, dweight, dbias = torch.autograd.grad(sum(result.sum() for result in found[:4]), leaves)
    assert dx[ids == -100].count_nonzero() == 0
    assert dweight.isfinite().all()
    assert dbias.isfinite().all()


@cpp_only
def test_ignored_rows_and_frozen_parameters_cost_no_product(monkeypatch):
    x, weight, bias, ids = problem(9, 8, 40)
    counted, rows = int((ids != -100).sum()), []
    for name in ("mm", "addmm"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=original, **k: rows.append(a[0].shape) or f(*a, **k))
    for needs in itertools.product((False, True), repeat=3):
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip((x, weight, bias), needs, strict=True)]
        rows.clear()
        found = ops.linear_log_prob(leaves[0], leaves[1], ids, linear_bias=leaves[2], backend="cpp")
        assert [tuple(shape) for shape in rows] == [(counted, 8)]
        if any(needs):
            torch.autograd.grad(found.entropy.sum(), [leaf for leaf in leaves if leaf.requires_grad])
            assert len(rows) == 2 + needs[0] + needs[1]


def extreme(kind):
    """input, weight, bias, ids with logits of +-1e4, or far from 0 and close together, or masked."""
    x, weight, bias, ids = problem(8, 32, 3000, ignored=0.0)
    if kind == "large":
        weight *= 1e4
    elif kind == "shifted":
        bias = bias + 1e4
    elif kind == "masked":
        bias[::3] = -torch.inf
        bias[1000:2100] = -torch.inf  # a whole block of the kernel
        ids = ids // 30 * 3 + 1
        ids[ids >= 1000] = 1
    else:  # the first block is masked, later ones rise
        bias = bias + torch.linspace(-60, 60, 3000)
        bias[:1024] = -torch.inf
        ids[:] = 2000
    return x, weight, bias, ids


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["large", "shifted", "masked", "rising"])
@pytest.mark.parametrize("name", RESULTS)
def test_extreme_logits(isa, backend, kind, name):
    *tensors, ids = extreme(kind)
    fused, stock = pair(ids, (name,), backend=backend)
    masked = tensors[2] == -torch.inf
    if name == "mean_logit" and masked.any():
        out = fused(*tensors)
        assert (out == -torch.inf).all()
        return
    upstream = torch.randn(8)
    sides = []
    for function, dtype in ((fused, torch.float32), (stock, torch.float32), (stock, torch.float64)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in map(torch.clone, tensors)]
        out = function(*leaves)
        sides.append([out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))])
    for what, ours, theirs, exact in zip(("output", "input", "weight", "bias"), *sides, strict=True):
        assert ours.isfinite().all(), what
        assert_parity(ours, theirs, exact, f"{kind}: {what}", slack=2.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_id_that_is_masked(backend):
    x, weight, bias, _ = problem(3, 8, 20)
    bias[4] = -torch.inf
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    found = ops.linear_log_prob(x, weight, torch.tensor([4, 5, 4]), linear_bias=bias, backend=backend)
    assert (found.log_prob == -torch.inf).tolist() == [True, False, True]
    assert found.entropy.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(found.log_prob.sum(), leaves))


@cpp_only
def test_hopeless_classes_leave_no_subnormal_numbers():
    """They would slow the products down by an order of magnitude and more."""
    x, weight, bias, ids = problem(9, 8, 4000)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    found = ops.linear_log_prob(x, weight, ids, linear_bias=20 * bias, backend="cpp")
    for grad in torch.autograd.grad((found.log_prob + found.entropy).sum(), leaves):
        assert ((grad == 0) | (grad.abs() >= torch.finfo(torch.float32).tiny)).all()


@pytest.mark.parametrize("upstream", [1e-30, 1e-8, 1e30])
def test_gradients_from_tiny_and_huge_upstreams(isa, upstream):
    *tensors, ids = problem(8, 16, 500)
    for name in RESULTS:
        sides = []
        for function, dtype in zip(pair(ids, (name,)), (torch.float32, torch.float64), strict=True):
            leaves = [tensor.to(dtype).requires_grad_() for tensor in map(torch.clone, tensors)]
            out = function(*leaves)
            sides.append(torch.autograd.grad(out, leaves, torch.full_like(out, upstream)))
        for ours, exact in zip(*sides, strict=True):
            assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max(), name


@pytest.mark.parametrize("upstream", [2.0**-30, 2.0**-12, 1.0])
def test_float16_gradients_do_not_underflow_before_their_time(isa, upstream):
    """Under float32 weights and a bias, which could hold them; with a scale besides, the inverse of a temperature."""
    x, weight, bias, ids = problem(16, 16, 2000, ignored=0.1)
    x, weight = x.half(), weight.half().float()  # the backends cast the weight
    bias = bias.half().float()
    for names in (*((name,) for name in RESULTS), RESULTS):
        results = []
        for function, double in zip(pair(ids, names, 2.0), (False, True), strict=True):
            leaves = [t.double() if double else t.clone() for t in (x, weight, bias)]
            leaves = [leaf.requires_grad_() for leaf in leaves]
            out = function(*leaves)
            results.append(torch.autograd.grad(out, leaves[1:], torch.full_like(out, upstream)))
        for ours, exact in zip(*results, strict=True):
            error = (ours - exact).abs().max() / exact.abs().max()
            assert error < 8 * torch.finfo(torch.float16).eps, (names, error)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_autocast_as_linear_would(dtype):
    x, weight, bias, ids = problem(30, 24, 259)
    results = []
    for function in pair(ids, RESULTS):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        with torch.autocast("cpu", dtype):
            out = function(*leaves)
        out.sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    exact_leaves = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    out = pair(ids, RESULTS)[1](*exact_leaves)
    out.sum().backward()
    for ours, stock, exact in zip(*results, (out, *(leaf.grad for leaf in exact_leaves)), strict=True):
        assert ours.dtype == stock.dtype == torch.float32
        errors = [(found.double() - exact).abs().max() for found in (ours, stock)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * exact.abs().max(), errors


def test_backward_twice_and_results_changed_in_place():
    x, weight, _, ids = problem(9, 8, 40)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    found = ops.linear_log_prob(x, weight, ids, backend=FUSED)
    total = (found.log_prob * 2 + found.entropy).sum()
    once = torch.autograd.grad(total, leaves, retain_graph=True)
    twice = torch.autograd.grad(total, leaves)
    assert all(map(torch.equal, once, twice))
    again = ops.linear_log_prob(x, weight, ids, backend=FUSED)
    again.entropy.add_(again.log_prob.mul_(2))  # backward needs neither
    for changed, plain in zip(torch.autograd.grad(again.entropy.sum(), leaves), once, strict=True):
        torch.testing.assert_close(changed, plain)


def test_activation_checkpointing():
    x, weight, _, ids = problem(9, 8, 40)
    weight.requires_grad_()

    def total(x, w):
        found = ops.linear_log_prob(x * 1, w * 1, ids, backend=FUSED)
        return (found.log_prob + found.entropy).sum()

    expected = torch.autograd.grad(total(x, weight), weight)[0]
    checkpointed = torch.utils.checkpoint.checkpoint(total, x, weight, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(checkpointed, weight)[0], expected)


@reference_only
def test_torch_backend_in_float64():
    x, weight, bias, ids = (
        tensor.double() if tensor.is_floating_point() else tensor for tensor in problem(4, 3, 5, 0.3)
    )
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    for names in (*((name,) for name in RESULTS), RESULTS):
        fused, stock = pair(ids, names, 1.3, backend="torch")
        assert torch.autograd.gradcheck(fused, leaves)
        assert fused(*leaves).dtype == torch.float64
        torch.testing.assert_close(fused(*leaves), stock(*leaves))


@cpp_only
def test_threads_do_not_change_a_bit(isa, small_chunks):
    """The kernel's part: results and bias gradients. (Matrix products are torch's and fixed per thread count.)"""
    x, weight, bias, ids = problem(41, 1, 3001)
    bias.requires_grad_()
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found = ops.linear_log_prob(x, weight, ids, linear_bias=bias, backend="cpp")
        total = found.log_prob.sum() + found.entropy.sum() + found.mean_logit.sum()
        results.append((*(result.detach() for result in found), *torch.autograd.grad(total, [bias])))
    for one, two, three in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(two, three)


def test_opcheck(small_chunks):
    x, weight, bias, ids = problem(9, 6, 40)
    for grad, labels, with_bias in itertools.product((False, True), (ids, None), (bias, None)):
        leaves = [None if t is None else t.detach().clone().requires_grad_(grad) for t in (x, weight, with_bias)]
        arguments = (leaves[0], leaves[1], labels, leaves[2], 0.7, -100, FUSED)
        opcheck(torch.ops.fasttune.linear_log_prob.default, arguments)
    statistics = torch.ops.fasttune.linear_log_prob(x, weight, ids, bias, 0.7, -100, FUSED)[-1]
    statistics[ids == -100] = 0.0
    for upstream in ((torch.rand(9), None, torch.rand(9), None), (None, torch.rand(9), None, torch.rand(9))):
        arguments = (*upstream, x, weight, ids, bias, statistics, 0.7, -100, True, False, True, FUSED)
        opcheck(torch.ops.fasttune.linear_log_prob_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend):
    x, weight, bias, ids = problem(12, 6, 40)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    for labels, names in ((ids.view(3, 4), RESULTS), (ids.view(3, 4), ("entropy",)), (None, RESULTS[1:])):

        def function(x, weight, bias, labels=labels, names=names):
            found = ops.linear_log_prob(x.view(3, 4, 6), weight, labels, linear_bias=bias, scale=0.5, backend=backend)
            return torch.stack([getattr(found, name) for name in names])

        out, expected = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves), function(*leaves)
        torch.testing.assert_close(out, expected)
        compiled, eager = (torch.autograd.grad(out.sum() * 2, leaves) for out in (out, expected))
        torch.testing.assert_close(compiled, eager)


MEMORY = """
import re, torch
from fasttune import ops

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

torch.set_num_threads(2)
x, weight = torch.randn(640, 256, requires_grad=True), (torch.randn(50257, 256) * 0.02).requires_grad_()
ids = torch.randint(0, 50257, (640,))
torch.mm(x.detach()[:256], weight.detach().t())  # the matrix library's own workspace, which any large product leaves
ops.linear_log_prob(x[:2], weight[:2048], ids[:2] % 2048)
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = status("VmRSS")
found = ops.linear_log_prob(x, weight, ids)
(found.log_prob + found.entropy).sum().backward()
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
    batch, ids = x.view(2, 3, 8), torch.zeros(2, 3, dtype=torch.long)

    def call(x=batch, weight=weight, ids=ids, **options):
        return ops.linear_log_prob(x, weight, ids, backend=backend, **options)

    wrong = ids.clone()
    wrong[1, 0] = 7
    with pytest.raises(IndexError, match=r"ids at position \(1, 0\) is 7; expected a value from 0 to 4 or -100"):
        call(ids=wrong)
    if backend != "triton":  # a GPU's tensors are not read back: there the log-probability is NaN
        with pytest.raises(IndexError, match=r"ids at position 3 is 7"):
            call(x=x, ids=wrong.view(-1))
    with pytest.raises(ValueError, match=r"linear_weight is float32 of shape \(5, 4\).*expected shapes"):
        call(weight=weight[:, :4])
    with pytest.raises(ValueError, match=r"linear_weight is float32 of shape \(0, 8\).*expected at least one class"):
        call(weight=weight[:0])
    with pytest.raises(ValueError, match=r"linear_bias is float32 of shape \(4,\)"):
        call(linear_bias=bias[:4])
    with pytest.raises(TypeError, match="linear_weight is float16.*expected torch.float32"):
        call(weight=weight.half())
    with pytest.raises(ValueError, match=r"ids is int64 of shape \(3,\)"):
        call(ids=ids[0])
    with pytest.raises(TypeError, match="ids is float32.*expected integers"):
        call(ids=ids.float())
    with pytest.raises(ValueError, match="scale is inf; expected a finite number"):
        call(scale=float("inf"))
    with pytest.raises(TypeError, match="scale is '2'; expected a number"):
        call(scale="2")
    with pytest.raises(TypeError, match="ignore_index is None; expected an integer"):
        call(ignore_index=None)


@triton_only
def test_an_id_out_of_range_on_a_gpu_is_not_a_number():
    x, weight, bias, ids = problem(6, 8, 5, ignored=0.0)
    ids[2] = 7
    weight.requires_grad_()
    found = ops.linear_log_prob(x, weight, ids, linear_bias=bias, backend=FUSED)
    assert found.log_prob.isnan().tolist() == [False, False, True, False, False, False]
    assert all(result.isfinite().all() for result in found[1:4])
