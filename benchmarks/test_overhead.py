"""What a forward call costs beyond its kernel: dispatch, checks and autograd, on inputs of a few numbers.

The time that a call spends inside the compiled library, and in linear_cross_entropy's matrix products, is measured
there and taken off; what is left is what Python, torch and autograd cost (and two readings of the clock per kernel).
"""

import time
from functools import partial
from statistics import median

import pytest
import torch
import torch.nn.functional as F

from fasttune import ops
from fasttune.ops import _cpp

OPERATIONS = (
    "attention",
    "layer_norm",
    "dropout_add_layer_norm",
    "bias_gelu",
    "layer_norm_gelu",
    "gelu_layer_norm",
    "dropout",
    "rotary",
    "embedding",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_log_prob",
    "linear_max",
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
        "rotary": lambda: partial(ops.rotary, _numbers(2, 3, 1, 16), *torch.randn(2, 2, 16), rotated=2),
        "embedding": lambda: partial(ops.embedding, labels, _numbers(5, 16)),
        "cross_entropy": lambda: partial(ops.cross_entropy, x, labels),
        "linear_cross_entropy": lambda: partial(ops.linear_cross_entropy, x, _numbers(5, 16), labels),
        "linear_log_prob": lambda: partial(ops.linear_log_prob, x, _numbers(5, 16), labels),
        "linear_max": lambda: partial(ops.linear_max, x, _numbers(5, 16), torch.tensor([0, 1, 2])),
    }[operation]()


class _Clock:
    """Stands in for the compiled library and adds up the time that is spent in it."""

    def __init__(self, library):
        self.library, self.seconds = library, 0.0

    def __getattr__(self, name):
        member = getattr(self.library, name)
        if not callable(member):
            return member

        setattr(self, name, self.timed(member))
        return getattr(self, name)

    def timed(self, function):
        def call(*args, **options):
            started = time.perf_counter()
            result = function(*args, **options)
            self.seconds += time.perf_counter() - started
            return result

        return call


ITERATIONS = 20


@pytest.mark.parametrize("operation", OPERATIONS)
def test_overhead(operation, benchmark, quick, monkeypatch):
    benchmark.group = "overhead of a forward call"
    call, clock, kernel_seconds, torch_seconds = _call(operation), _Clock(_cpp.library), [], []
    norm = partial(F.layer_norm, _numbers(2, 16), (16,), _numbers(16), _numbers(16))
    monkeypatch.setattr(_cpp, "library", clock)
    monkeypatch.setattr(torch, "mm", clock.timed(torch.mm))

    def some_calls():
        clock.seconds = 0.0
        for _ in range(ITERATIONS):
            call()
        kernel_seconds.append(clock.seconds / ITERATIONS)

    def torchs_turn():  # the same without fasttune: how fast this machine runs such calls at the moment
        started = time.perf_counter()
        for _ in range(ITERATIONS):
            norm()
        torch_seconds.append((time.perf_counter() - started) / ITERATIONS)

    benchmark.pedantic(some_calls, setup=torchs_turn, rounds=20 if quick else 300, warmup_rounds=5)
    benchmark.extra_info.update({"group": "overhead", "shape": operation, "threads": torch.get_num_threads()})
    if benchmark.stats is not None:
        whole = [seconds / ITERATIONS for seconds in benchmark.stats.stats.data]
        overhead = median(a - b for a, b in zip(whole, kernel_seconds[-len(whole) :], strict=True))
        benchmark.extra_info.update(
            {
                "overhead_us": 1e6 * overhead,
                "kernel_us": 1e6 * median(kernel_seconds),
                "layer_norm_us": 1e6 * median(torch_seconds),
            }
        )
