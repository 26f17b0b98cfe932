"""Class weights and labels that do not count: what a kernel must not read, it must not read on the way either.

A label with ignore_index is no index. Weights stand in memory full of NaN, which would reach the mean's divisor, and
in the C++ library's case between pages that nobody may touch.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from fused import FUSED, INTERPRETED, cpp_only, triton_only
from oracle import assert_same_math

from fasttune import ops

CLASSES, ROWS = 37, 20


def poisoned(values, margin=200):
    """The same values as a view into memory that is NaN for `margin` elements on both sides."""
    buffer = torch.full((values.numel() + 2 * margin,), torch.nan)
    buffer[margin:-margin] = values
    return buffer[margin:-margin]


def functions(operation, target, weight, clean, **options):
    """(fused, stock, inputs, names): of logits, or of a linear layer's input and weight."""
    if operation == "cross_entropy":

        def fused(logits):
            return ops.cross_entropy(logits, target, weight=weight, backend=FUSED, **options)

        def stock(logits):
            return F.cross_entropy(logits, target, weight=clean.to(logits.dtype), **options)

        return fused, stock, [torch.randn(ROWS, CLASSES)], ["logits"]

    def fused(x, linear_weight):
        return ops.linear_cross_entropy(x, linear_weight, target, weight=weight, backend=FUSED, **options)

    def stock(x, linear_weight):
        return F.cross_entropy(F.linear(x, linear_weight), target, weight=clean.to(x.dtype), **options)

    return fused, stock, [torch.randn(ROWS, 24), torch.randn(CLASSES, 24) / 5], ["input", "weight"]


# Before the weights, at them, right behind them and further on: all inside the NaNs.
@pytest.mark.parametrize("ignore_index", [-100, -1, CLASSES, CLASSES + 150, 5])
@pytest.mark.parametrize("operation", ["cross_entropy", "linear_cross_entropy"])
def test_weights_of_labels_that_do_not_count_are_not_read(isa, operation, ignore_index):
    clean = torch.rand(CLASSES) + 0.1
    weight = poisoned(clean)
    target = torch.randint(CLASSES, (ROWS,))
    target[::3] = ignore_index
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "sum"}, {"reduction": "none"}):
        if ignore_index == 5 and INTERPRETED:  # a class whose weight only smoothing asks for; the C++ library sums all
            weight[ignore_index] = clean[ignore_index] if "label_smoothing" in options else torch.nan
        options = {**options, "ignore_index": ignore_index}
        assert_same_math(*functions(operation, target, weight, clean, **options))


@triton_only
@pytest.mark.parametrize("label", [CLASSES, -1, 2**40])
@pytest.mark.parametrize("operation", ["cross_entropy", "linear_cross_entropy"])
def test_a_label_out_of_range_leaves_the_divisor_alone(operation, label):
    """It makes the loss NaN; the interpreter's memory check would stop a read of its weight."""
    weight, target = torch.rand(CLASSES) + 0.1, torch.randint(CLASSES, (ROWS,))
    target[4] = label
    fused, _, inputs, _ = functions(operation, target, weight, weight)
    assert fused(*inputs).isnan()


GUARDED = """
import ctypes, itertools, mmap, os, sys
import torch
if "FASTTUNE_MUTANT" in os.environ:  # a library with a bug, of one instruction set
    import mutant
from fasttune import ops
from fasttune.ops import _cpp

isas = [_cpp.library.active_isa()] if "FASTTUNE_MUTANT" in os.environ else _cpp.library.available_isas()
PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
kept = []

def guarded(tensor, at_end):
    "The same values in pages of their own, flush with one end; the page before and the page behind cannot be touched."
    pages = -(-tensor.nbytes // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = PAGE * (pages + 1) - tensor.nbytes if at_end else PAGE
    view = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    view.copy_(tensor)
    for page in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(start + page * PAGE), PAGE, 0) == 0
    kept.append(memory)
    return view

torch.manual_seed(0)
classes, rows = 37, 20
for isa, at_end, ignore_index in itertools.product(isas, (False, True), (-100, 150)):
    _cpp.library.select_isa(isa)
    weight, bias = (guarded(torch.rand(classes), at_end) for _ in range(2))
    target = torch.randint(classes, (rows,))
    target[0] = target[-1] = ignore_index
    target = guarded(target, at_end)
    logits = guarded(torch.randn(rows, classes), at_end).requires_grad_()
    x, linear = (guarded(torch.randn(n, 24), at_end).requires_grad_() for n in (rows, classes))
    for reduction, smoothing in itertools.product(("mean", "none"), (0.0, 0.1)):
        options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction, "label_smoothing": smoothing}
        ops.cross_entropy(logits, target, backend="cpp", **options).sum().backward()
        ops.linear_cross_entropy(x, linear, target, linear_bias=bias, backend="cpp", **options).sum().backward()
print("untouched", len(kept))
sys.stdout.flush()
"""


@cpp_only
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect by its address")
def test_nothing_beyond_the_operands_is_touched():
    result = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True)
    assert result.returncode == 0, (
        f"exit status {result.returncode} (-11: a read of guarded memory)\n{result.stderr[-2000:]}"
    )
    assert "untouched" in result.stdout
