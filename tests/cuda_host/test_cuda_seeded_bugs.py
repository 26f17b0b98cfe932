"""The parity checks of this folder can fail: with a bug in a kernel, they do."""

import pytest
import torch
from oracle import assert_same_math

from cuda_host import test_cuda_attention_terms, test_cuda_rotary
from cuda_host.test_cuda_attention import NAMES, fused, stock, tensors
from cuda_host.test_cuda_sanitizers import (
    LOST_CLAMP,
    LOST_RUN,
    MISSING_WAIT,
    OVERWRITTEN_RUN,
    SAME_HALF,
    SHIFTED_DIAGONAL,
    WRONG_FRAGMENT,
)


@pytest.mark.parametrize("bug", [MISSING_WAIT, WRONG_FRAGMENT])
def test_parity_sees_a_bug(harness, bug):
    inputs = tensors(1, 150, 1, 64, dtype=torch.bfloat16)
    assert_same_math(fused(), stock(False), inputs, NAMES)
    harness.seed_bug(bug)
    with pytest.raises(AssertionError, match=r"output: (error|not finite)"):
        assert_same_math(fused(), stock(False), inputs, NAMES)


def test_the_rotary_parity_sees_a_bug(harness):
    """Angles would not show it: both halves of their rows are equal."""
    arguments = (2, 5, 16, 16, torch.float32)
    test_cuda_rotary.check(*arguments)
    harness.seed_bug(SAME_HALF)
    with pytest.raises(AssertionError, match="grad x: error"):
        test_cuda_rotary.check(*arguments)


@pytest.mark.parametrize(
    ("bug", "grad"), [(SHIFTED_DIAGONAL, "bias"), (LOST_CLAMP, "bias"), (LOST_RUN, "c2p"), (OVERWRITTEN_RUN, "c2p")]
)
def test_the_parity_of_terms_sees_a_bug(harness, bug, grad):
    check = test_cuda_attention_terms.test_buckets_in_any_order_and_tables_of_two_lengths
    check(torch.float32)
    harness.seed_bug(bug)
    with pytest.raises(AssertionError, match=f"grad {grad}: error"):
        check(torch.float32)
