"""The CUDA attention, run on the host, of queries that stand behind the last key of their sequence."""

from functools import partial

import behind_keys
import pytest
import torch
from oracle import DTYPES, assert_same_math

from fasttune import ops
from fasttune.ops import _random

SEED = torch.tensor([11])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("causal", "dropout_p"), [(True, 0.0), (True, 0.3), (False, 0.3)])
@pytest.mark.parametrize("case", behind_keys.CASES)
def test_matches_dense_attention(case, causal, dropout_p, dtype):
    def fused(*tensors):
        with _random.repeating([SEED]):
            options = {"causal": causal, "dropout_p": dropout_p, "backend": "cuda"}
            return ops.attention(*tensors, **behind_keys.layout(case), **options)

    def dense(*tensors, normalise_last=False):
        return behind_keys.dense(*tensors, case, causal, dropout_p, SEED, normalise_last)

    inputs = behind_keys.tensors(case, 32, dtype)
    assert_same_math(fused, dense, inputs, ["query", "key", "value"], again=[partial(dense, normalise_last=True)])
