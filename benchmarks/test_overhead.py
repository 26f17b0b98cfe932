"""What a forward call costs beyond its kernel: dispatch, checks and autograd, on inputs of a few numbers."""

from functools import partial

import pytest
import torch

from fasttune import ops

LIMIT_SECONDS = 40e-6
OPERATIONS = (
    "attention",
    "layer_norm",
    "dropout_add_layer_norm",
    "bias_gelu",
    "layer_norm_gelu",
    "gelu_layer_norm",
    "dropout",
    "embedding",
    "cross_entropy",
    "linear_cross_entropy",
)


def _numbers(*shape):
    return torch.randn(shape, requires_grad=True)


def _call(operation):
    x, weight, bias, labels = _numbers(2, 16), _numbers(16), _numbers(16), torch.tensor([1, 3])
    return {
        "attention": lambda: partial(
            ops.attention, *(_numbers(1, 2, 1, 16) for _ in "qkv"), causal=True, dropout_p=0.1
        ),
        "layer_norm": lambda: partial(ops.layer_norm, x, weight, bias),
        "dropout_add_layer_norm": lambda: partial(
            ops.dropout_add_layer_norm, x, _numbers(2, 16), weight, bias, dropout_p=0.1
        ),
        "bias_gelu": lambda: partial(ops.bias_gelu, x, bias, approximate="tanh"),
        "layer_norm_gelu": lambda: partial(ops.layer_norm_gelu, x, weight, bias),
        "gelu_layer_norm": lambda: partial(ops.gelu_layer_norm, x, weight, bias),
        "dropout": lambda: partial(ops.dropout, x, dropout_p=0.1),
        "embedding": lambda: partial(ops.embedding, labels, _numbers(5, 16)),
        "cross_entropy": lambda: partial(ops.cross_entropy, x, labels),
        "linear_cross_entropy": lambda: partial(ops.linear_cross_entropy, x, _numbers(5, 16), labels),
    }[operation]()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_overhead(operation, benchmark, quick):
    benchmark.group = "overhead of a forward call"
    benchmark.pedantic(_call(operation), rounds=20 if quick else 300, iterations=20, warmup_rounds=5)
    benchmark.extra_info.update({"group": "overhead", "shape": operation, "threads": torch.get_num_threads()})
    if benchmark.stats is not None and not quick:
        assert benchmark.stats.stats.median < LIMIT_SECONDS
