"""ops.attention of queries that stand behind the last key of their sequence, against dense attention in float64."""

from functools import partial

import behind_keys
import pytest
import torch
from fused import BACKENDS, either
from oracle import DTYPES, SWEEP_SLACK, assert_same_math

from fasttune import ops
from fasttune.ops import _random

NAMES = ["query", "key", "value"]
SEED = torch.tensor([11])


def fused(case, backend, causal, dropout_p, window=None):
    def attend(*tensors):
        with _random.repeating([SEED]):
            options = {"causal": causal, "window": window, "dropout_p": dropout_p, "backend": backend}
            return ops.attention(*tensors, **behind_keys.layout(case), **options)

    return attend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", either(DTYPES, [torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", behind_keys.CASES)
def test_matches_dense_attention(isa, case, causal, dropout_p, dtype, backend):
    def dense(*tensors, normalise_last=False):
        return behind_keys.dense(*tensors, case, causal, dropout_p, SEED, normalise_last)

    inputs = behind_keys.tensors(case, 32, dtype)
    assert_same_math(
        fused(case, backend, causal, dropout_p), dense, inputs, NAMES, again=[partial(dense, normalise_last=True)]
    )


# 0: a query behind its last key sees none; 70: some see the last keys, past a block.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", either([0, 1, 70], [1]))
@pytest.mark.parametrize(("causal", "dropout_p"), [(True, 0.0), (False, 0.3)])
@pytest.mark.parametrize("case", behind_keys.CASES)
def test_a_window_goes_by_position(isa, case, causal, dropout_p, window, backend):
    def dense(*tensors, normalise_last=False):
        return behind_keys.dense(*tensors, case, causal, dropout_p, SEED, normalise_last, window)

    inputs = behind_keys.tensors(case, 32, torch.float32)
    run = fused(case, backend, causal, dropout_p, window)
    # Few keys are seen: of a handful of weights the dense product is right by luck.
    assert_same_math(run, dense, inputs, NAMES, SWEEP_SLACK, [partial(dense, normalise_last=True)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_keys_all_is_zero(isa, backend):
    inputs = [x.requires_grad_() for x in behind_keys.tensors("no key at all", 32, torch.float32)]
    out = fused("no key at all", backend, True, 0.3)(*inputs)
    assert out.shape == inputs[0].shape
    assert (out == 0).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), inputs))
