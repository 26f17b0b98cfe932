"""The parity checks of this folder can fail: with a bug in a kernel, they do."""

import pytest
import torch
from oracle import assert_same_math

from cuda_host.test_cuda_attention import NAMES, fused, stock, tensors
from cuda_host.test_cuda_sanitizers import MISSING_WAIT, WRONG_FRAGMENT


@pytest.mark.parametrize("bug", [MISSING_WAIT, WRONG_FRAGMENT])
def test_parity_sees_a_bug(harness, bug):
    inputs = tensors(1, 150, 1, 64, dtype=torch.bfloat16)
    assert_same_math(fused(), stock(False), inputs, NAMES)
    harness.seed_bug(bug)
    with pytest.raises(AssertionError, match=r"output: (error|not finite)"):
        assert_same_math(fused(), stock(False), inputs, NAMES)
