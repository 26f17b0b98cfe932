"""The CUDA attention in a sliding window, run on the host: which keys are seen, and which never touched."""

from functools import partial

import behind_keys
import pytest
import torch
from oracle import SWEEP_SLACK, assert_same_math

from fasttune import ops
from fasttune.ops import _random

NAMES = ("query", "key", "value")
SEED = torch.tensor([11])


def attend(backend, *tensors, **options):
    with _random.repeating([SEED]):
        return ops.attention(*tensors, backend=backend, **options)


# Blocks of 64 queries (float32: 32) by 64 keys (float32: 32; at head dimension 128 half as many). 33 reaches into the
# next block, 70 over it; with fewer keys than queries the first see none.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "causal", "window"),
    [(150, 150, 64, False, 33), (150, 150, 32, True, 70), (90, 200, 16, False, 70), (150, 70, 128, True, 3)],
)
def test_matches_the_reference(queries, keys, head_dim, causal, window, dtype):
    inputs = [torch.randn(1, rows, 1, head_dim).to(dtype) for rows in (queries, keys, keys)]
    options = {"causal": causal, "window": window, "dropout_p": 0.2}
    fused, reference = (partial(attend, backend, **options) for backend in ("cuda", "torch"))
    assert_same_math(fused, reference, inputs, NAMES, SWEEP_SLACK)  # of few weights the reference is right by luck


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("causal", "window"), [(True, 1), (False, 70)])
@pytest.mark.parametrize("case", ["at padding", "no key, one key", "within and behind"])
def test_a_window_of_chosen_queries_goes_by_position(case, causal, window, dtype):
    def dense(*tensors, normalise_last=False):
        return behind_keys.dense(*tensors, case, causal, 0.3, SEED, normalise_last, window)

    options = {"causal": causal, "window": window, "dropout_p": 0.3, **behind_keys.layout(case)}
    inputs = behind_keys.tensors(case, 32, dtype, heads=1)
    again = [partial(dense, normalise_last=True)]
    assert_same_math(partial(attend, "cuda", **options), dense, inputs, NAMES, SWEEP_SLACK, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_what_lies_outside_is_never_touched(causal, dtype):
    """The first 64 keys, and so the queries near them, are NaN. Blocks of at most 64 carry that to their neighbours,
    but not to row 256: forward, by dQ's blocks of keys, and by dK and dV's blocks of queries."""
    cu_seqlens = torch.tensor([0, 0, 330, 331])
    upstream, inputs = torch.randn(331, 1, 16).to(dtype), [torch.randn(331, 1, 16).to(dtype) for _ in range(3)]
    results = []
    for key_and_value in (1.0, float("nan")):
        for x in inputs[1:]:
            x[:64] *= key_and_value
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend("cuda", *leaves, causal=causal, window=5, dropout_p=0.3, cu_seqlens=cu_seqlens)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    assert results[1][0][:64].isnan().all()
    assert all(torch.equal(clean[256:], poisoned[256:]) for clean, poisoned in zip(*results, strict=True))
