"""ops.attention in a sliding window: which keys are seen, in every layout, and that those outside are never touched."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from fused import BACKENDS, FUSED, cpp_only, either, needs_fused, reference_only
from oracle import DTYPES, SWEEP_SLACK, assert_same_math

from fasttune import ops
from fasttune.ops._reference.philox import attention_keep_mask

NAMES = ["query", "key", "value"]


def seen(queries, keys, causal, window):
    """(Q, K), aligned at the last query and the last key."""
    ahead = torch.arange(keys) - torch.arange(keys - queries, keys)[:, None]
    return (ahead.abs() <= window) & ((ahead <= 0) | (not causal))


def stock(causal, window):
    def function(query, key, value):
        mask = seen(query.shape[1], key.shape[1], causal, window)
        blind = ~mask.any(1, keepdim=True)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | blind)
        return out.masked_fill(blind, 0.0).transpose(1, 2)

    return function


def ours(backend=FUSED, seed=3, **options):
    def function(query, key, value):
        torch.manual_seed(seed)
        return ops.attention(query, key, value, backend=backend, **options)

    return function


def qkv(batch, queries, keys, heads, head_dim, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(batch, rows, heads, head_dim).to(dtype) for rows in (queries, keys, keys)]


def gradients(function, inputs, upstream):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


# A key alone, a vector, the C++ block of 64 and one off it, all. 150 keys take three blocks of C++, two of Triton's;
# with fewer keys than queries the first queries see none.
@pytest.mark.parametrize("dtype", either(DTYPES, [torch.bfloat16]))
@pytest.mark.parametrize("window", either([0, 1, 5, 63, 64, 65, 1000], [0, 5, 64]))
@pytest.mark.parametrize("causal", [False, True])
def test_matches_stock(isa, causal, window, dtype):
    for queries, keys, head_dim in either([(67, 67, 17), (67, 150, 64), (150, 70, 40)], [(67, 150, 64), (150, 70, 40)]):
        inputs = qkv(1, queries, keys, 2, head_dim, dtype)
        # Where a few keys are seen, stock's own error is that of few elements.
        assert_same_math(ours(causal=causal, window=window), stock(causal, window), inputs, NAMES, SWEEP_SLACK)


# C++: blocks of 64, three chunks of queries and three segments of 512 keys, of which a window of 64 spans one or two,
# one of 600 two or three; sums over so many rows, one after the other, are three times as far off as stock's, with a
# window or without.
# Triton, interpreted: tiles of 64 and 128, steps of 128 keys; 200 leaves tiles in which nothing is hidden.
@pytest.mark.parametrize("window", either([64, 255, 600], [200]))
@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences_with_dropout(isa, causal, window):
    rows = either(1300, 420)
    inputs = qkv(1, rows, rows, 1, either(64, 16))
    options = {"causal": causal, "window": window, "dropout_p": 0.2}
    assert_same_math(ours(**options), ours("torch", **options), inputs, NAMES, SWEEP_SLACK)


@pytest.mark.parametrize("causal", [False, True])
def test_drops_the_weights_that_it_drops_without_a_window(isa, causal):
    keys, width, window, p = 300, 100, 70, 0.4
    query, key, _ = qkv(1, keys, keys, 2, width)
    torch.manual_seed(11)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    kept = attention_keep_mask(torch.arange(keys), torch.arange(2).view(1, 2, 1), keys, seed, p)  # (B, H, Q, K)
    expected = kept & seen(keys, keys, causal, window)
    for first in range(0, keys, width):
        value = torch.zeros(1, keys, 2, width)
        value[:, first : first + width] = torch.eye(width).unsqueeze(1)  # the output is a part of the weights
        out = ours(seed=11, causal=causal, window=window, dropout_p=p)(query, key, value).transpose(1, 2)
        assert torch.equal(out != 0, expected[..., first : first + width])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_is_each_sequence_alone(isa, backend, causal):
    offsets = [0, 0, 5, 70, 70, 71, 200, 200]  # empty sequences at both ends and inside, one of one token
    inputs = [x[0] for x in qkv(1, 200, 200, 2, 32)]
    upstream = torch.randn(200, 2, 32)
    for window in either((0, 3, 64), (3,)):
        options = {"causal": causal, "window": window}
        packed = gradients(ours(backend, cu_seqlens=torch.tensor(offsets), **options), inputs, upstream)
        alone = []
        for first, last in itertools.pairwise(offsets):
            part = [x[first:last].unsqueeze(0) for x in inputs]
            results = gradients(ours(backend, **options), part, upstream[first:last].unsqueeze(0))
            alone.append([x.squeeze(0) for x in results])
        for what, actual, parts in zip(["output", *NAMES], packed, zip(*alone, strict=True), strict=True):
            if backend != "torch":
                assert torch.equal(actual, torch.cat(parts)), what
            else:
                torch.testing.assert_close(actual, torch.cat(parts), msg=what)


@pytest.mark.parametrize("causal", [False, True])
def test_chosen_queries_are_what_they_are_among_all(isa, causal):
    """Their outputs and gradients bit for bit in C++; keys and values sum over other blocks of queries."""
    lengths = either([9, 700, 0, 90], [9, 150, 0, 90])
    positions = [[], list(range(3, lengths[1], 7)), [], [0, 1, 40, 40, 89]]
    cu, cu_q = (torch.tensor([0, *x]).cumsum(0) for x in (lengths, list(map(len, positions))))
    at = torch.tensor([place for places in positions for place in places])
    flat = at + cu[:-1].repeat_interleave(cu_q.diff())
    inputs = [torch.randn(sum(lengths), 2, 32) for _ in range(3)]
    upstream = torch.randn(at.numel(), 2, 32)
    chosen = {"cu_seqlens": cu, "cu_seqlens_q": cu_q, "positions_q": at}
    for window in either((0, 5, 100), (70,)):
        options = {"causal": causal, "window": window, "dropout_p": 0.3}

        def few(q, k, v, options=options):
            return ours(**options, **chosen)(q.index_select(0, flat), k, v)

        def every(q, k, v, options=options):
            return ours(**options, cu_seqlens=cu)(q, k, v).index_select(0, flat)

        of_few, of_all = (gradients(function, inputs, upstream) for function in (few, every))
        assert torch.equal(of_few[0], of_all[0]) or FUSED == "triton"  # where numpy's products depend on a row's place
        for actual, expected in zip(of_few, of_all, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@needs_fused
@pytest.mark.parametrize(("causal", "dropout_p", "chosen"), [(False, 0.0, True), (True, 0.3, False)])
def test_what_lies_outside_is_never_touched(isa, causal, dropout_p, chosen):
    """The first 100 keys, and so the queries near them, are NaN. Blocks of at most 128 carry that to their neighbours,
    not to row 400: forward, by dQ's blocks of keys, and by dK and dV's blocks of queries."""
    rows, poisoned, clean = either(1300, 448), 100, 400
    query, key, value = (x[0] for x in qkv(1, rows, rows, 1, 64))
    upstream = torch.randn(rows, 1, 64)
    options = {"causal": causal, "window": 5, "dropout_p": dropout_p, "cu_seqlens": torch.tensor([0, rows])}
    if chosen:
        options |= {"cu_seqlens_q": options["cu_seqlens"], "positions_q": torch.arange(rows)}
    expected = gradients(ours(**options), [query, key, value], upstream)
    key[:poisoned] = value[:poisoned] = float("nan")
    actual = gradients(ours(**options), [query, key, value], upstream)
    assert actual[0][:poisoned].isnan().all()
    for what, a, b in zip(["output", *NAMES], actual, expected, strict=True):
        assert torch.equal(a[clean:], b[clean:]), what


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", either(DTYPES, [torch.float32]))
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_queries_that_see_no_key_give_zero_and_pass_no_gradient(isa, backend, dropout_p, dtype):
    queries, keys, window = 200, 20, 3  # the first 177 stand too far before key 0
    inputs = qkv(2, queries, keys, 2, 32, dtype)
    upstream = torch.randn(2, queries, 2, 32).to(dtype)
    blind = queries - keys - window
    upstream[:, :blind] = 1e4
    run = ours(backend, window=window, dropout_p=dropout_p)
    out, dquery, *of_keys = gradients(run, inputs, upstream)
    assert not out[:, :blind].any()
    assert not dquery[:, :blind].any()
    upstream[:, :blind] = 0
    assert all(map(torch.equal, of_keys, gradients(run, inputs, upstream)[2:]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wide_window_hides_nothing(isa, backend):
    inputs, upstream = qkv(1, 90, 70, 1, 32), torch.randn(1, 90, 1, 32)
    for causal in (False, True):
        expected = gradients(ours(backend, causal=causal), inputs, upstream)
        for window in (89, 2**30 - 1, 2**30, 2**40):
            assert all(
                map(torch.equal, gradients(ours(backend, causal=causal, window=window), inputs, upstream), expected)
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_near_the_end_of_int32(isa, backend):
    """At the last position, the widest window that there is ends far behind the last key."""
    last, widest = 2**31 - 1, 2**30 - 1
    query, key, value = (torch.randn(rows, 1, 16) for rows in (2, 3, 3))
    chosen = {"cu_seqlens": torch.tensor([0, 3]), "cu_seqlens_q": torch.tensor([0, 2])}
    out = ours(backend, window=widest, positions_q=torch.tensor([widest + 1, last]), **chosen)(query, key, value)
    expected = F.scaled_dot_product_attention(query[:1].transpose(0, 1), *(x[1:].transpose(0, 1) for x in (key, value)))
    torch.testing.assert_close(out[:1], expected.transpose(0, 1))
    assert not out[1].any()


@cpp_only  # the others subtract two roundings of the same number
@pytest.mark.parametrize("chosen", [False, True])
def test_a_query_that_sees_itself_alone_gets_exactly_no_gradient(isa, chosen):
    rows = 150
    inputs = [x[0] * 10 for x in qkv(1, rows, rows, 2, 64)]
    options = {"window": 0, "cu_seqlens": torch.tensor([0, rows])}
    if chosen:
        options |= {"cu_seqlens_q": options["cu_seqlens"], "positions_q": torch.arange(rows)}
    upstream = torch.randn(rows, 2, 64)
    out, dquery, dkey, dvalue = gradients(ours(**options), inputs, upstream)
    assert torch.equal(out, inputs[2])
    assert torch.equal(dvalue, upstream)
    assert not dquery.any()
    assert not dkey.any()


@cpp_only
@needs_fused
@pytest.mark.parametrize("window", [64, 700])
@pytest.mark.parametrize("causal", [False, True])
def test_bits_do_not_depend_on_threads(causal, window):
    """One head, three segments of 512 keys, or six of 256: the threads share it, and dQ's sum begins at any of them."""
    for head_dim, dtype in [(64, torch.float32), (128, torch.bfloat16)]:
        inputs, upstream = qkv(1, 1300, 1400, 1, head_dim, dtype), torch.randn(1, 1300, 1, head_dim).to(dtype)
        results = []
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            try:
                results.append(gradients(ours(causal=causal, window=window, dropout_p=0.1), inputs, upstream))
            finally:
                torch.set_num_threads(2)
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


@reference_only
@pytest.mark.parametrize("window", [0, 2, 50])
@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_stock_in_float64(causal, window):
    for queries, keys in [(9, 9), (5, 12), (12, 5)]:
        inputs = [x.double() for x in qkv(2, queries, keys, 3, 20)]
        actual = ours("torch", causal=causal, window=window)(*inputs)
        torch.testing.assert_close(actual, stock(causal, window)(*inputs), rtol=0, atol=1e-14)


@reference_only
def test_torch_backend_passes_gradcheck():
    inputs = [torch.randn(1, rows, 2, 3, dtype=torch.float64, requires_grad=True) for rows in (6, 3, 3)]
    # The first query stands three before key 0 and sees none.
    assert torch.autograd.gradcheck(ours("torch", window=2, dropout_p=0.3), inputs)
