"""ops.linear_max against linear and the maximum over each sequence: values, gradients, ties, NaN, bits, memory."""

import os
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from fused import BACKENDS, FUSED, cpp_only, either
from hypothesis import given, settings
from oracle import DTYPES, SWEEP_SLACK, assert_same_math, run
from torch.library import opcheck

from fasttune import ops
from fasttune.ops import linear_max as module_function

implementation = sys.modules["fasttune.ops.linear_max"]

NAMES = ["input", "weight", "bias"]
# Empty sequences in front, between and behind; one token; more than a tile of Triton's.
LENGTHS = (0, 5, 1, 0, 40, 17, 0)


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def problem(lengths, features, classes, dtype=torch.float32):
    """input, weight, bias. No two tokens of a sequence come near each other at the top of a class, so that every way to
    round a logit has the same winner."""
    x, weight, bias = torch.randn(sum(lengths), features), torch.randn(classes, features), torch.randn(classes)
    x, weight, bias = (tensor.to(dtype).double() for tensor in (x, weight / features**0.5, bias))
    near = torch.ones(classes, dtype=torch.bool)
    while near.any():
        logits = (x @ weight.T + bias).split(lengths)
        gaps = [part.topk(2, 0).values.diff(dim=0).abs()[0] for part in logits if part.shape[0] > 1]
        near = torch.stack(gaps).amin(0) < 1e-4 if gaps else torch.zeros(classes, dtype=torch.bool)
        weight[near] = (torch.randn(int(near.sum()), features) / features**0.5).to(dtype).double()
    return [tensor.to(dtype) for tensor in (x, weight, bias)]


def whole_numbers(lengths, features, classes, dtype):
    """input, weight, bias whose logits are exact in every dtype, and mostly tied."""
    shapes = (sum(lengths), features), (classes, features), (classes,)
    return [torch.randint(-1, 2, shape).to(dtype) for shape in shapes]


def fused(lengths, backend=FUSED):
    def function(x, weight, bias=None):
        return ops.linear_max(x, weight, offsets(lengths), linear_bias=bias, backend=backend)

    return function


def stock(lengths):
    def function(x, weight, bias=None):
        logits = F.linear(x, weight, bias)
        empty = torch.full(weight.shape[:1], -torch.inf, dtype=logits.dtype) + logits[:0].sum(0)
        return torch.stack([part.max(0).values if part.shape[0] else empty for part in logits.split(lengths)])

    return function


def finite(function):
    """What the oracle compares, without the sequences that have no tokens: infinities have no difference."""

    def call(*tensors):
        out = function(*tensors)
        return torch.where(out == -torch.inf, 0.0, out)

    return call


def assert_same(lengths, tensors, backend=FUSED, slack=1.0, again=()):
    names = NAMES[: len(tensors)]
    assert_same_math(finite(fused(lengths, backend)), finite(stock(lengths)), tensors, names, slack, again)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_matches_torch(isa, bias):
    tensors = problem(LENGTHS, 192, 259)[: 2 + bias]
    order = torch.randperm(192)
    base = finite(stock(LENGTHS))
    again = [lambda x, weight, *rest: base(x[:, order], weight[:, order], *rest)]
    assert_same(LENGTHS, tensors, again=again)
    out = fused(LENGTHS)(*tensors)
    assert (out[[0, 3, 6]] == -torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_ties_go_to_the_first_token(isa, backend, dtype):
    if dtype == torch.float64:
        backend = "torch"
    tensors = whole_numbers(LENGTHS, 12, 133, dtype)
    logits = F.linear(*tensors).split(LENGTHS)
    ties = torch.cat([(part == part.amax(0)).sum(0) for part in logits if part.shape[0]])
    assert (ties > 1).sum() > 100
    assert_same(LENGTHS, tensors, backend)
    # One class and sequence after the other, its gradient is a row of the input at the first winner.
    x, weight, bias = (tensor.clone().requires_grad_() for tensor in tensors)
    out = fused(LENGTHS, backend)(x, weight, bias)
    for n, v in ((1, 0), (4, 132), (5, 70)):
        token = sum(LENGTHS[:n]) + int(logits[n][:, v].max(0).indices)
        dx, dweight, dbias = torch.autograd.grad(out[n, v], (x, weight, bias), retain_graph=True)
        expected = torch.zeros_like(dx), torch.zeros_like(dweight), torch.zeros_like(dbias)
        expected[0][token], expected[1][v], expected[2][v] = weight[v], x[token], 1
        for ours, truth in zip((dx, dweight, dbias), expected, strict=True):
            assert torch.equal(ours, truth)


@pytest.mark.parametrize("native", either([False, True], [True]), ids=["float32", "native"][either(0, 1) :])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_matches_torch_in_low_precision(isa, monkeypatch, dtype, native):
    """Both ways of the C++ library: in float32, converting the weight by blocks, and in bfloat16 where it is native."""
    monkeypatch.setattr(sys.modules["fasttune.ops._linear_chunks"], "_native_bfloat16", lambda: native)
    monkeypatch.setattr(sys.modules["fasttune.ops._linear_chunks"], "WEIGHT_BLOCK_BYTES", 12 * 4 * 100)
    for lengths in (LENGTHS, (3, 30)):
        assert_same(lengths, whole_numbers(lengths, 12, 259, dtype))
    if native:
        return
    # Logits that only float32 tells apart: the winner is float64's, where stock has rounded them to a tie.
    tensors = problem(LENGTHS, 40, 259, dtype)
    upstream = torch.randn(len(LENGTHS), 259).to(dtype)
    exact = run(stock(LENGTHS), [tensor.double() for tensor in tensors], upstream.double())
    for ours, truth, like in zip(run(fused(LENGTHS), tensors, upstream), exact, (None, *tensors), strict=True):
        assert ours.dtype == dtype
        bound = torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), truth, rtol=bound, atol=bound * (1 if like is None else 4))


def test_float32_weights_under_low_precision_inputs(monkeypatch):
    tensors = whole_numbers(LENGTHS, 24, 70, torch.float32)
    for dtype in DTYPES[1:]:
        leaves = [tensors[0].to(dtype).requires_grad_(), *(tensor.clone().requires_grad_() for tensor in tensors[1:])]
        out = fused(LENGTHS)(*leaves)
        assert out.dtype == dtype
        upstream = torch.randn(out.shape).to(dtype)
        grads = torch.autograd.grad(out, leaves, upstream)
        exact = run(stock(LENGTHS), tensors, upstream.float())
        assert [grad.dtype for grad in grads] == [dtype, torch.float32, torch.float32]
        torch.testing.assert_close(out.float(), exact[0])
        for ours, truth in zip(grads, exact[1:], strict=True):
            torch.testing.assert_close(ours.float(), truth, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@settings(max_examples=either(40, 10), deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 7, 20, 33]), min_size=1, max_size=9),
    features=st.integers(16, 40),
    classes=st.integers(1, 300),
    bias=st.booleans(),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape(lengths, features, classes, bias, zeros, seed):
    torch.manual_seed(seed)
    tensors = problem(lengths, features, classes)[: 2 + bias]
    mask = (torch.rand(len(lengths), classes) >= zeros).double()

    def masked(function):
        return lambda *tensors: finite(function)(*tensors) * mask.to(tensors[0].dtype)

    assert_same_math(masked(fused(lengths)), masked(stock(lengths)), tensors, NAMES[: 2 + bias], slack=SWEEP_SLACK)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_take_the_maximum_of(backend):
    x, weight, bias = torch.randn(0, 6), torch.randn(11, 6), torch.randn(11)
    for lengths in ((), (0,), (0, 0, 0)):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        out = fused(lengths, backend)(*leaves)
        assert out.shape == (len(lengths), 11)
        assert (out == -torch.inf).all()
        grads = torch.autograd.grad(out, leaves, torch.randn(out.shape))
        for grad, leaf in zip(grads, leaves, strict=True):
            assert grad.shape == leaf.shape
            assert grad.count_nonzero() == 0
    # No class, and no feature: the bias alone.
    assert fused((2, 1), backend)(torch.randn(3, 6), torch.randn(0, 6)).shape == (2, 0)
    out = fused((2, 1), backend)(torch.randn(3, 0), torch.randn(11, 0), bias)
    torch.testing.assert_close(out, bias.expand(2, 11))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_as_torch_max_takes_them(isa, backend):
    lengths, nan, inf = (4, 3, 5, 2), torch.nan, torch.inf
    # By token and class: NaN first, NaN after infinity, two NaN, nothing but -inf, infinities.
    x = torch.eye(14)
    weight = torch.randn(40, 14)
    weight[0, 0] = weight[1, 13] = nan
    weight[2, 4:7] = torch.tensor([inf, nan, nan])
    weight[3, 7:12] = -inf
    weight[4, 7:12] = torch.tensor([-inf, 1.0, inf, 2.0, inf])
    weight[39, 3] = nan
    logits = weight.T.contiguous()
    weight[weight.isinf()] = 0.0
    # A product of rows gives no infinity without NaN beside it (0 * inf), so the logits are the input under one class.
    for v in (0, 1, 2, 3, 4, 20, 39):
        column = logits[:, v : v + 1].clone().requires_grad_()
        out = ops.linear_max(column, torch.ones(1, 1), offsets(lengths), backend=backend)
        expected = torch.stack([part.max(0).values for part in column.split(lengths)])
        torch.testing.assert_close(out, expected, equal_nan=True)
        ours, truth = (torch.autograd.grad(each, column, torch.ones(4, 1))[0] for each in (out, expected))
        assert torch.equal(ours, truth), v
    out = ops.linear_max(x, weight, offsets(lengths), backend=backend)
    assert out.isnan().any(1).tolist() == [True] * 4  # 0 * NaN


def test_gradients_of_zero_touch_nothing():
    """SPLADE's relu makes most of them zero: an infinite weight behind one leaves no NaN."""
    x, weight, _ = problem(LENGTHS, 16, 60)
    weight[7] = torch.inf
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    out = fused(LENGTHS)(*leaves)
    upstream = torch.randn(out.shape)
    upstream[:, 7] = 0
    for grad in torch.autograd.grad(out, leaves, upstream):
        assert grad.isfinite().all()


def test_strides_and_offset_types():
    x, weight, bias = problem(LENGTHS, 10, 33)
    upstream = torch.randn(len(LENGTHS), 33)
    expected = run(fused(LENGTHS), [x, weight, bias], upstream)
    wide, tall = torch.zeros(x.shape[0], 17), torch.zeros(66, 10)
    wide[:, 2:12], tall[::2] = x, weight
    views = [
        (wide[:, 2:12], tall[::2], torch.stack((bias, bias), 1)[:, 0]),
        (x.t().contiguous().t(), weight.t().contiguous().t(), bias),
    ]
    for tensors in views:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        for cu in (offsets(LENGTHS), offsets(LENGTHS).long(), torch.stack((offsets(LENGTHS),) * 2, 1)[:, 0]):
            out = ops.linear_max(leaves[0], leaves[1], cu, linear_bias=leaves[2])
            grads = torch.autograd.grad(out, leaves, upstream.t().contiguous().t())
            for ours, truth in zip((out, *grads), expected, strict=True):
                torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_needed(backend, needs):
    tensors = problem(LENGTHS, 16, 40)
    upstream = torch.randn(len(LENGTHS), 40)
    expected = [grad for grad, need in zip(run(stock(LENGTHS), tensors, upstream)[1:], needs, strict=True) if need]
    leaves = [tensor.clone().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]
    out = fused(LENGTHS, backend)(*leaves)
    grads = torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], upstream)
    for ours, truth in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_as_linear_would(backend, dtype):
    tensors = whole_numbers(LENGTHS, 24, 70, torch.float32)
    upstream, results = torch.randn(len(LENGTHS), 70).to(dtype), []
    for function in (fused(LENGTHS, backend), stock(LENGTHS)):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        with torch.autocast("cpu", dtype):
            out = function(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, upstream)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@cpp_only
def test_threads_do_not_change_a_bit(isa):
    """The kernel's part: sums of gradients and tokens. (Matrix products are torch's and fixed per thread count.)"""
    lengths = (300, 0, 1, 70)
    for features in (1, 300):
        tensors = whole_numbers(lengths, features, 1003, torch.float32)
        upstream = torch.randn(len(lengths), 1003)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(fused(lengths), tensors, upstream))
        torch.set_num_threads(2)
        for others in results[1:]:
            for one, other in zip(results[0], others, strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("classes", either([5000], [700]))
def test_one_token_wins_every_class(isa, classes):
    """Its gradient is a sum over the whole vocabulary, as exact as a product's."""
    lengths = (9, 3)
    x, weight = torch.rand(12, 24), torch.randn(classes, 24).abs() / 5
    x[4] += 2
    x[11] += 2
    logits = (x @ weight.T).split(lengths)
    assert all((part.argmax(0) == token).all() for part, token in zip(logits, (4, 2), strict=True))
    assert_same(lengths, [x, weight])


def test_opcheck():
    tensors = problem(LENGTHS, 12, 40)
    cu = offsets(LENGTHS)
    for grad in (False, True):
        leaves = [tensor.clone().requires_grad_(grad) for tensor in tensors]
        opcheck(torch.ops.fasttune.linear_max.default, (*leaves, cu, FUSED))
    opcheck(torch.ops.fasttune.linear_max.default, (*tensors[:2], None, cu, FUSED))
    _, token = torch.ops.fasttune.linear_max(*tensors, cu, FUSED)
    arguments = (torch.randn(len(LENGTHS), 40), *tensors, cu, token, True, False, True, FUSED)
    opcheck(torch.ops.fasttune.linear_max_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend):
    leaves = [tensor.requires_grad_() for tensor in problem(LENGTHS, 12, 40)]
    cu = offsets(LENGTHS)

    def function(x, weight, bias):
        return torch.log1p(torch.relu(ops.linear_max(x, weight, cu, linear_bias=bias, backend=backend)))

    out, expected = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves), function(*leaves)
    torch.testing.assert_close(out, expected)
    compiled, eager = (torch.autograd.grad(each.sum(), leaves) for each in (out, expected))
    torch.testing.assert_close(compiled, eager)


MEMORY = """
import re, torch
from fasttune import ops

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

torch.set_num_threads(2)
x, weight = torch.randn(2048, 64, requires_grad=True), torch.randn(30522, 64, requires_grad=True)
cu = torch.arange(0, 2049, 256, dtype=torch.int32)
small = ops.linear_max(x[:1024], weight[:1024], cu[:5])  # the matrix library's own workspace
small.sum().backward()
x.grad = weight.grad = None
del small
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = status("VmRSS")
ops.linear_max(x, weight, cu).sum().backward()
print(status("VmHWM") - before - x.nbytes - weight.nbytes)
"""


@cpp_only
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory counter")
def test_extra_memory_stays_below_16_mb():
    """Beyond the gradients; the logits alone would take 250 MB."""
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(result.stdout) <= 16e6


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_is_named(backend):
    x, weight, bias = torch.randn(6, 8), torch.randn(5, 8), torch.randn(5)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)

    def call(x=x, weight=weight, cu=cu, **options):
        return ops.linear_max(x, weight, cu, backend=backend, **options)

    with pytest.raises(ValueError, match=r"input is float32 of shape \(2, 3, 8\).*expected shapes \(T, C\) and \(V, C"):
        call(x=x.view(2, 3, 8))
    with pytest.raises(ValueError, match=r"linear_weight is float32 of shape \(5, 4\).*expected shapes"):
        call(weight=weight[:, :4])
    with pytest.raises(ValueError, match=r"linear_bias is float32 of shape \(4,\)"):
        call(linear_bias=bias[:4])
    with pytest.raises(TypeError, match="linear_weight is float16.*expected torch.float32"):
        call(weight=weight.half())
    with pytest.raises(TypeError, match="linear_bias is int64.*expected a floating-point tensor"):
        call(linear_bias=bias.long())
    with pytest.raises(TypeError, match="cu_seqlens is a list; expected a torch.Tensor of integers"):
        call(cu=[0, 6])
    with pytest.raises(TypeError, match="linear_max: cu_seqlens is float32.*expected int32 or int64"):
        call(cu=cu.float())
    with pytest.raises(
        ValueError, match=r"linear_max: cu_seqlens is int32 of shape \(0,\).*expected shape \(N \+ 1,\)"
    ):
        call(cu=cu[:0])
    with pytest.raises(ValueError, match="linear_max: cu_seqlens runs from 0 to 2; expected 0 to 6, the rows of input"):
        call(cu=cu[:2])
    with pytest.raises(ValueError, match="linear_max: cu_seqlens runs from 1 to 6"):
        call(cu=torch.tensor([1, 6]))
    with pytest.raises(ValueError, match="linear_max: cu_seqlens falls from 7 to 6 at position 2"):
        call(cu=torch.tensor([0, 7, 6]))
    assert module_function is ops.linear_max
