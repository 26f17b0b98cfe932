"""The CUDA cross-entropy, run on the host, against stock torch in the tested dtype and in float64."""

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, assert_same_math

from fasttune import ops
from fasttune.ops import _cuda
from fasttune.ops._cpp import DTYPE_CODES
from fasttune.ops.cross_entropy import _cross_entropy

OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.1, "reduction": "none", "weighted": True},
    {"weighted": True},
    {"label_smoothing": 1.0, "reduction": "sum"},
]


def labels(rows, classes):
    target = torch.randint(0, classes, (rows,))
    if rows > 1:
        target[1], target[0] = -100, classes - 1
    return target


def pair(target, options, classes):
    """(fused, stock) as functions of the logits; stock computes in the logits' dtype."""
    options = dict(options)
    weight = torch.rand(classes) + 0.1 if options.pop("weighted", False) else None

    def fused(logits):
        return ops.cross_entropy(logits, target, weight=weight, backend="cuda", **options)

    def stock(logits):
        return F.cross_entropy(logits, target, weight=None if weight is None else weight.to(logits.dtype), **options)

    return fused, stock


# 2: a binary head; 1000: fewer than a block's threads hold; 50257: GPT-2's, whose rows start at every alignment.
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("classes", [2, 1000, 50257])
def test_matches_torch(classes, options):
    target = labels(4, classes)
    assert_same_math(*pair(target, options, classes), [torch.randn(4, classes) * 3], ["logits"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_torch_in_every_dtype(dtype):
    target = labels(9, 2259)
    logits = (torch.randn(9, 2259) * 3).to(dtype)
    assert_same_math(*pair(target, {}, 2259), [logits], ["logits"])
    assert_same_math(*pair(target, {"reduction": "none", "label_smoothing": 0.2}, 2259), [logits], ["logits"])


def test_rows_may_lie_apart_and_classes_be_masked():
    logits = torch.randn(5, 300)[:, 7:210]
    logits[:, 3] = float("-inf")
    target = labels(5, 200).clamp(min=4)
    ours, stock = pair(target, {}, 203)
    torch.testing.assert_close(ours(logits), stock(logits))


def test_all_rows_ignored():
    logits = torch.randn(3, 17, requires_grad=True)
    target = torch.full((3,), -100)
    assert ops.cross_entropy(logits, target, backend="cuda").isnan()
    loss = ops.cross_entropy(logits, target, reduction="sum", backend="cuda")
    assert loss == 0.0
    assert (torch.autograd.grad(loss, logits)[0] == 0.0).all()


def test_a_label_out_of_range_is_nan_and_reads_nothing():
    # Through the operator: the public function checks labels that lie on a CPU.
    logits, target = torch.randn(3, 17), torch.tensor([2, 2**40, -5])
    loss, statistics, total = _cross_entropy._run(logits, target, None, -100, 0.0, 0, "cuda")
    assert loss.isnan().tolist() == [False, True, True]
    dlogits = torch.ops.fasttune.cross_entropy_backward(
        torch.ones(3), logits, target, None, statistics, total, -100, 0.0, 0, "cuda"
    )
    assert dlogits.isnan().all(1).tolist() == [False, True, True]


def test_the_gradient_may_overwrite_the_logits():
    logits, target = torch.randn(4, 531).bfloat16(), labels(4, 531)
    _, statistics, total = _cross_entropy._run(logits, target, None, -100, 0.1, 0, "cuda")
    expected = torch.ops.fasttune.cross_entropy_backward(
        torch.ones(4), logits, target, None, statistics, total, -100, 0.1, 0, "cuda"
    )
    upstream, address = torch.ones(1), logits.data_ptr()
    _cuda.library.cross_entropy_backward(
        *(DTYPE_CODES[logits.dtype], 4, 531, address, 531, target.data_ptr(), 0, 0, -100, 0.1),
        *(statistics.data_ptr(), upstream.data_ptr(), 0, 0, address, 531, 0),
    )
    assert torch.equal(logits, expected)
