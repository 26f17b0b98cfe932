"""The CUDA attention with terms of its scores, run on the host, against the composition of torch operators."""

from functools import partial

import pytest
import torch
from oracle import DTYPES, SWEEP_SLACK, assert_same_math

from fasttune import ops
from fasttune.ops import _random

SEED = torch.tensor([11])


def attend(backend, terms, query, key, value, *given, **options):
    with _random.repeating([SEED]):
        of = dict(zip(terms, given, strict=True))
        return ops.attention(query, key, value, backend=backend, **of, **options)


def inputs_of(terms, queries, keys, heads, head_dim, furthest, width, dtype, batch=()):
    shapes = {
        "bias": (heads, 2 * furthest + 1),
        "c2p": (*batch, queries, heads, width),
        "p2c": (*batch, keys, heads, width),
    }
    tensors = [torch.randn(*batch, rows, heads, head_dim) for rows in (queries, keys, keys)]
    scores = [torch.randn(shapes[term]) * (1 if term == "bias" else head_dim**0.5) for term in terms]
    return [x.to(dtype) for x in (*tensors, *scores)]


def options_of(terms, furthest, width):
    """Buckets in order, as a model has them: near distances one each, far ones in runs."""
    if terms == ("bias",):
        return {}
    distance = torch.arange(-furthest, furthest + 1)
    near = max(width // 4, 1)
    bucket = distance.sign() * (distance.abs().clamp(max=near) + (distance.abs() - near).clamp(min=0) // 5)
    return {"buckets": (bucket + width // 2).clamp(0, width - 1)}


def check(terms, inputs, **options):
    fused, reference = (partial(attend, backend, terms, **options) for backend in ("cuda", "torch"))
    assert_same_math(fused, reference, inputs, ["query", "key", "value", *terms], SWEEP_SLACK)


SETS = [("bias",), ("c2p",), ("p2c",), ("bias", "c2p", "p2c")]


# Blocks of 64 queries by 64 keys (float32 32 by 32; at head dimension 128 half as many keys). 200 distances go over
# everything, 70 over a block, 3 and 1 reach nearly none.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", SETS)
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "furthest", "width", "causal", "window"),
    [
        (150, 150, 64, 200, 90, False, None),
        (70, 150, 40, 3, 5, False, 40),
        (150, 90, 16, 70, 33, True, None),
        (66, 66, 128, 1, 3, True, 30),
    ],
)
def test_matches_the_reference(terms, queries, keys, head_dim, furthest, width, causal, window, dtype):
    options = {"causal": causal, "window": window, "dropout_p": 0.2 if causal else 0.0}
    inputs = inputs_of(terms, queries, keys, 2, head_dim, furthest, width, dtype, batch=(2,))
    check(terms, inputs, **options_of(terms, furthest, width), **options)


def test_a_table_of_one_number():
    """It moves all scores alike, and its gradient is the sum of dS, 0: of 16 bits' out there would be its rounding."""
    check(("bias",), inputs_of(("bias",), 40, 70, 1, 16, 0, 1, torch.float32, batch=(1,)))


# A bucket that comes again in a row adds to what is there, in the gradient's dtype: one more rounding each time.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_buckets_in_any_order_and_tables_of_two_lengths(dtype):
    terms = ("bias", "c2p", "p2c")
    buckets = torch.randint(0, 7, (2 * 21 + 1,))
    inputs = inputs_of(terms, 40, 70, 2, 16, 33, 7, dtype, batch=(1,))
    check(terms, inputs, buckets=buckets)


# Positions before the first key, behind the last, twice the same, and further apart than the table reaches.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("terms", SETS)
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 9), (True, 9)])
def test_chosen_queries_inside_before_and_behind(terms, causal, window, dtype):
    lengths, furthest, width = [9, 150, 0, 40], 30, 25
    positions = [[-(2**30), -7, -1, 0, 8, 9], list(range(-20, 170, 2)), [-1, 3], [0, 1, 1, 39, 39, 60, 2**30]]
    cu_seqlens, cu_seqlens_q = (torch.tensor([0, *x]).cumsum(0) for x in (lengths, list(map(len, positions))))
    flat = torch.tensor([place for places in positions for place in places])
    inputs = inputs_of(terms, flat.numel(), sum(lengths), 2, 32, furthest, width, dtype)
    layout = {"cu_seqlens": cu_seqlens, "cu_seqlens_q": cu_seqlens_q, "positions_q": flat}
    options = {"causal": causal, "window": window, "dropout_p": 0.2}
    check(terms, inputs, **options_of(terms, furthest, width), **layout, **options)
