"""The CUDA kernels of linear_log_prob, run on the host, against the reference in the tested dtype and in float64."""

import itertools
from functools import partial

import pytest
import torch
from oracle import DTYPES, SWEEP_SLACK, assert_same_math

from fasttune import ops
from fasttune.kernels import linear_chunks

RESULTS = ("log_prob", "logsumexp", "entropy", "mean_logit")
SUBSETS = [names for size in (1, 2, 4) for names in itertools.combinations(RESULTS, size)]


def problem(rows, features, classes, dtype=torch.float32):
    tensors = torch.randn(rows, features), torch.randn(classes, features) / features**0.5, torch.randn(classes)
    ids = torch.randint(0, classes, (rows,))
    ids[0] = classes - 1
    ids[1:2] = -100
    return *(tensor.to(dtype) for tensor in tensors), ids


def pair(ids, names, scale=0.7):
    def side(backend, x, weight, bias=None):
        found = ops.linear_log_prob(x, weight, ids, linear_bias=bias, scale=scale, backend=backend)
        return torch.cat([getattr(found, name) for name in names])

    return partial(side, "cuda"), partial(side, "torch")


# 2: a binary head; 1000: fewer than a block's threads hold; 50257: GPT-2's, whose rows start at every alignment.
@pytest.mark.parametrize(
    ("classes", "names"),
    [*itertools.product([2, 1000], SUBSETS), *((50257, names) for names in SUBSETS if len(names) != 2)],
    ids=str,
)
def test_matches_the_reference(classes, names):
    *tensors, ids = problem(5, 24, classes)
    assert_same_math(*pair(ids, names), tensors, ["input", "weight", "bias"], SWEEP_SLACK)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [*((name,) for name in RESULTS), RESULTS], ids="-".join)
def test_matches_the_reference_in_every_dtype(monkeypatch, dtype, names):
    """In three chunks."""
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", 7 * 2304 * dtype.itemsize)
    *tensors, ids = problem(19, 24, 2259, dtype)
    assert_same_math(*pair(ids, names), tensors[:2], ["input", "weight"], SWEEP_SLACK)


def test_without_ids_and_with_equals():
    logits = torch.randint(-9, -4, (4, 5000)).float()
    logits[0, [8, 2047, 2048, 4999]] = 3.0
    logits[1] = -2.0
    logits[2, [4500, 4501, 11]] = 1.0
    for scale in (1.0, -1.0):
        found = ops.linear_log_prob(torch.eye(4), logits.t().contiguous(), None, scale=scale, backend="cuda")
        assert found.log_prob is None
        assert torch.equal(found.top1, (logits * scale).argmax(-1))


@pytest.mark.parametrize("offset", [0.0, -1000.0, 10000.0])
def test_masked_and_large_logits(offset):
    x, weight, bias, ids = problem(6, 24, 5000)
    bias += offset + torch.linspace(-40, 40, 5000)
    bias[:2100] = -torch.inf
    ids = ids.where(ids == -100, 4000)
    for name in RESULTS[:3]:
        assert_same_math(*pair(ids, (name,)), [x, weight, bias], ["input", "weight", "bias"], SWEEP_SLACK)
    assert (ops.linear_log_prob(x, weight, None, linear_bias=bias, backend="cuda").mean_logit == -torch.inf).all()


def test_an_id_out_of_range_is_nan_and_reads_nothing():
    # Through the operator: the public function checks ids that lie on a CPU.
    x, weight, bias, _ = problem(4, 8, 17)
    ids = torch.tensor([2, 2**40, -5, -100])
    log_prob, *others, statistics = torch.ops.fasttune.linear_log_prob(x, weight, ids, bias, 1.0, -100, "cuda")
    assert log_prob.isnan().tolist() == [False, True, True, False]
    assert all(result.isfinite().all() for result in others)
    for upstream, wrong in (((torch.ones(4), None), True), ((None, torch.ones(4)), False)):
        dinput, *_ = torch.ops.fasttune.linear_log_prob_backward(
            *upstream, None, None, x, weight, ids, bias, statistics, 1.0, -100, True, False, False, "cuda"
        )
        assert dinput.isnan().all(1).tolist() == [False, wrong, wrong, False]


@pytest.mark.parametrize("upstream", [2.0**-30, 1.0])
def test_float16_gradients_do_not_underflow_before_their_time(upstream):
    x, weight, bias, ids = problem(16, 16, 2000)
    weight, bias = weight.half().float().requires_grad_(), bias.half().float().requires_grad_()
    found = ops.linear_log_prob(x.half(), weight, ids, linear_bias=bias, scale=2.0, backend="cuda")
    ours = torch.autograd.grad(found.log_prob, (weight, bias), torch.full((16,), upstream))
    exact = [tensor.detach().double().requires_grad_() for tensor in (weight, bias)]
    truth = ops.linear_log_prob(x.half().double(), exact[0], ids, linear_bias=exact[1], scale=2.0, backend="torch")
    for gradient, true in zip(ours, torch.autograd.grad(truth.log_prob.sum() * upstream, exact), strict=True):
        assert (gradient - true).abs().max() < 8 * torch.finfo(torch.float16).eps * true.abs().max()
