"""The Triton chunk loop of linear_cross_entropy against stock torch, its corners, and the bytes of a chunk."""

import pytest
import torch
import torch.nn.functional as F
from interpreter.memory import traffic
from oracle import DTYPES, assert_same_math

from fasttune import ops
from fasttune.kernels import linear_cross_entropy as kernel

OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1, "weighted": True},
    {"normalizer": 7.0},
    {"normalizer": torch.tensor(7), "reduction": "sum"},
]
NAMES = ("input", "weight", "bias")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 15 rows of 500 float32 logits: 37 rows take three."""
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 15 * 512 * 4)


def problem(rows, features, classes, dtype=torch.float32):
    """input, weight, bias, target; logits of the size that a trained head has."""
    tensors = torch.randn(rows, features), torch.randn(classes, features) / features**0.5, torch.randn(classes)
    target = torch.randint(0, classes, (rows,))
    target[1::4] = -100
    target[0] = classes - 1
    return *(tensor.to(dtype) for tensor in tensors), target


def pair(target, options, classes):
    options = dict(options)
    weight = torch.rand(classes) + 0.1 if options.pop("weighted", False) else None

    def fused(x, linear_weight, bias=None):
        return ops.linear_cross_entropy(
            x, linear_weight, target, linear_bias=bias, weight=weight, backend="triton", **options
        )

    def stock(x, linear_weight, bias=None):
        rest = {name: value for name, value in options.items() if name != "normalizer"}
        if "normalizer" in options:
            rest["reduction"] = "sum"
        cast = None if weight is None else weight.to(x.dtype)
        loss = F.cross_entropy(F.linear(x, linear_weight, bias), target, weight=cast, **rest)
        return loss / options["normalizer"] if "normalizer" in options else loss

    return fused, stock


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_matches_torch(options, bias):
    *tensors, target = problem(37, 48, 500)
    assert_same_math(*pair(target, options, 500), tensors[: 2 + bias], NAMES[: 2 + bias])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=str)
def test_matches_torch_in_low_precision(dtype, options):
    *tensors, target = problem(37, 48, 500, dtype)
    assert_same_math(*pair(target, options, 500), tensors, NAMES)


def test_float16_gradients_survive_division_by_many_rows():
    # p / 30000 is 1e-7 here, float16's last bit, were it divided before the products. The upstream factor is what loss
    # scaling has.
    x, weight, _, target = problem(32, 8, 300, torch.float16)
    leaves = [x.requires_grad_(), weight.requires_grad_()]

    def gradients(loss, leaves):
        return torch.autograd.grad(loss.float() * 2.0**15, leaves)

    ours = gradients(ops.linear_cross_entropy(*leaves, target, normalizer=3e4, backend="triton"), leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = gradients(F.cross_entropy(F.linear(*exact), target, reduction="sum").float() / 3e4, exact)
    for gradient, true in zip(ours, truth, strict=True):
        assert (gradient.double() - true).abs().max() < 4 * torch.finfo(torch.float16).eps * true.abs().max()


def test_float32_weights_beside_16_bit_activations_and_frozen_ones():
    x, weight, _, target = problem(20, 16, 100)
    x, weight = x.bfloat16().requires_grad_(), weight.requires_grad_()
    loss = ops.linear_cross_entropy(x, weight, target, backend="triton")
    assert [grad.dtype for grad in torch.autograd.grad(loss, (x, weight))] == [torch.bfloat16, torch.float32]
    loss = ops.linear_cross_entropy(x, weight.detach(), target, backend="triton")
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


def test_an_upstream_factor_of_one_costs_no_traffic():
    factor = torch.tensor(1.0)
    with traffic() as moved:
        same = kernel.scale_in_place(torch.arange(5000.0), factor)
    assert moved["scale_kernel", "store"] == 0
    assert torch.equal(same, torch.arange(5000.0))
    assert torch.equal(kernel.scale_in_place(torch.arange(5000.0), factor * 3), torch.arange(5000.0) * 3)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, at the 0 / 0 of a mean over no rows
def test_no_rows_and_no_row_that_counts():
    x, weight, bias, target = problem(6, 16, 100)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    for select in (slice(0, 0), slice(None)):
        labels = torch.full_like(target, -100)[select]
        loss = ops.linear_cross_entropy(x[select], weight, labels, linear_bias=bias, reduction="sum", backend="triton")
        assert loss == 0
        assert all((grad == 0).all() for grad in torch.autograd.grad(loss, leaves))
        assert ops.linear_cross_entropy(x[select], weight, labels, backend="triton").isnan()


def test_two_runs_give_the_same_bits():
    *tensors, target = problem(37, 48, 500)
    leaves = [tensor.requires_grad_() for tensor in tensors]

    def gradients():
        loss = ops.linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], backend="triton")
        return torch.autograd.grad(loss, leaves)

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_the_chunk_step_reads_the_logits_twice_and_writes_them_once(monkeypatch):
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 2**30)
    x, weight = torch.randn(6, 8).requires_grad_(), torch.randn(30522, 8).requires_grad_()
    with traffic() as moved:
        ops.linear_cross_entropy(x, weight, torch.arange(6), backend="triton")
    logits = 6 * 30522 * 4
    step = sum(count for (name, _), count in moved.items() if name == "cross_entropy_forward_kernel")
    print(f"linear_cross_entropy: chunk step {step / (3 * logits):.3f} x two reads and a write")
    assert step <= 1.05 * 3 * logits
