"""ops.attention against F.scaled_dot_product_attention and the explicit composition; masks, layouts, promises."""

import itertools
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from fused import BACKENDS, FUSED, cpp_only, either, needs_fused, reference_only
from hypothesis import given, settings
from oracle import DTYPES, SWEEP_SLACK, assert_parity, assert_same_math
from scipy import stats
from torch.utils.checkpoint import checkpoint

from fasttune import ops
from fasttune.ops._attention_call import Call
from fasttune.ops._reference.philox import attention_keep_mask, keep_scale, threshold
from fasttune.ops.attention import _attention, _attention_backward

NAMES = ["query", "key", "value"]


def stock(causal=False, scale=None):
    """F.scaled_dot_product_attention with this library's layout and alignment of the causal mask."""

    def function(query, key, value):
        queries, keys = query.shape[1], key.shape[1]
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if causal and queries != keys else None
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        same = causal and queries == keys
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=same, scale=scale).transpose(1, 2)

    return function


def ours(backend=FUSED, seed=3, **options):
    def function(query, key, value):
        torch.manual_seed(seed)
        return ops.attention(query, key, value, backend=backend, **options)

    return function


def qkv(batch, queries, keys, heads, head_dim, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(batch, rows, heads, head_dim).to(dtype) for rows in (queries, keys, keys)]


def gradients(function, inputs, upstream):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


# 16 and 128 are the ends; 17 and 40 are no multiples of a vector; 64 and 80 are BERT's and GPT-2 XL's neighbourhood.
# 67 and 150 leave ragged blocks of 64 keys, of six query rows and of a vector.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", either([16, 17, 40, 64, 80, 128], [17, 64, 128]))
@pytest.mark.parametrize("causal", [False, True])
def test_matches_stock(isa, dtype, head_dim, causal):
    for queries, keys in [(67, 67), (67, 150)]:
        inputs = qkv(2, queries, keys, 2, head_dim, dtype)
        assert_same_math(ours(causal=causal), stock(causal), inputs, NAMES)


# One token, one query against a cache, a block, a block and one, two segments of keys (512 at head size 64), more
# queries than keys (with fewer than 70 keys hidden from the first rows).
@pytest.mark.parametrize(
    ("batch", "queries", "keys"),
    [
        *((1, 1, 1), (3, 1, 9), (1, 2, 2), (2, 64, 64), (2, 65, 65), (1, 30, 1)),
        *either([(1, 513, 700), (1, 640, 513)], [(1, 130, 270), (1, 300, 140)]),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(isa, batch, queries, keys, causal):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = qkv(batch, queries, keys, 2, 64, dtype)
        slack = SWEEP_SLACK if batch * queries * keys < 64 else 1.0  # of a handful of weights stock is right by luck
        assert_same_math(ours(causal=causal), stock(causal), inputs, NAMES, slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_dropout_matches_the_reference(isa, dtype, causal):
    for queries, keys, head_dim in [(67, 67, 64), (20, 300, 48)]:
        inputs = qkv(2, queries, keys, 3, head_dim, dtype)
        options = {"causal": causal, "dropout_p": 0.3}
        assert_same_math(ours(**options), ours("torch", **options), inputs, NAMES)


def test_dropout_masks_are_the_specified_ones_bit_for_bit(isa):
    batch, queries, keys, heads, window, p = 2, 70, 300, 3, 100, 0.4
    query, key, _ = qkv(batch, queries, keys, heads, window)
    rows, sequence_heads = torch.arange(queries), torch.arange(batch * heads).view(batch, heads, 1)
    torch.manual_seed(11)
    expected = attention_keep_mask(rows, sequence_heads, keys, draw_same_seed(11), p)  # (B, H, Q, K)
    for first in range(0, keys, window):
        value = torch.zeros(batch, keys, heads, window)
        value[:, first : first + window] = torch.eye(window).unsqueeze(1)  # the output is a window of the weights
        out = ours(seed=11, dropout_p=p)(query, key, value).transpose(1, 2)
        assert torch.equal(out != 0, expected[..., first : first + window])


def draw_same_seed(seed):
    torch.manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)


def test_dropout_extremes():
    inputs = qkv(1, 5, 7, 2, 16)
    upstream = torch.ones(1, 5, 2, 16)
    for result in gradients(ours(dropout_p=1.0), inputs, upstream):
        assert torch.equal(result, torch.zeros_like(result))
    assert torch.equal(ours(dropout_p=1e-9)(*inputs), ours()(*inputs))


@needs_fused
def test_keep_rate_over_heads_and_queries():
    batch, heads, queries, keys, p = 2, 4, 64, 128, 0.1
    query, key, _ = qkv(batch, queries, keys, heads, 16)
    value = torch.eye(128)[None, :, None].expand(batch, keys, heads, 128)
    query, key = (F.pad(x, (0, 112)) for x in (query, key))
    dropped = ours(seed=4, dropout_p=p)(query, key, value) == 0  # (B, Q, H, K)
    n, expected = dropped.numel(), threshold(p) / 65536
    assert stats.binomtest(int(dropped.sum()), n, expected).pvalue > 1e-6
    deviation = (expected * (1 - expected)) ** 0.5
    for dim, name in [(0, "sequences"), (1, "queries"), (2, "heads"), (3, "keys")]:
        a, b = dropped.narrow(dim, 1, dropped.shape[dim] - 1), dropped.narrow(dim, 0, dropped.shape[dim] - 1)
        correlation = ((a.double() - expected) * (b.double() - expected)).mean().item() / deviation**2
        assert abs(correlation) < 5 / a.numel() ** 0.5, f"neighbouring {name}: correlation {correlation:.2g}"


def test_strided_views_give_the_same_bits():
    batch, rows, heads, head_dim = 2, 37, 3, 48
    torch.manual_seed(0)
    upstream = torch.randn(batch, heads, rows, head_dim).transpose(1, 2)  # strided too
    packed = torch.randn(batch, rows, 3, heads, head_dim)
    contiguous = [x.contiguous() for x in packed.unbind(2)]
    expected = gradients(ours(causal=True, dropout_p=0.2), contiguous, upstream.contiguous())
    layouts = {
        "views of a packed qkv": list(packed.unbind(2)),
        "views of (B, H, S, D)": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in contiguous],
        "last dimension strided": [x.transpose(1, 3).contiguous().transpose(1, 3) for x in contiguous],
        "rows of a longer buffer": [F.pad(x, (0, 5, 0, 0, 0, 3))[:, :rows, :, :head_dim] for x in contiguous],
    }
    for name, inputs in layouts.items():
        for what, actual, wanted in zip(
            ["output", *NAMES], gradients(ours(causal=True, dropout_p=0.2), inputs, upstream), expected, strict=True
        ):
            assert torch.equal(actual, wanted), f"{name}: {what}"
    shared = torch.randn(batch, rows, 1, head_dim).expand(batch, rows, heads, head_dim)  # stride 0 over heads
    assert torch.equal(ours()(contiguous[0], shared, shared), ours()(contiguous[0], shared.clone(), shared.clone()))


@needs_fused
def test_output_and_gradients_are_contiguous_rows():
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(2, 9, 9, 3, 16)]
    for result in gradients(ours(), inputs, torch.ones(2, 9, 3, 16)):
        assert result.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_is_each_sequence_alone(backend, offsets_dtype, causal):
    offsets = [0, 0, 5, 70, 70, 71, 200, 200]  # empty sequences at both ends and inside
    cu_seqlens = torch.tensor(offsets, dtype=offsets_dtype)
    inputs = [x[0] for x in qkv(1, 200, 200, 2, 32)]
    upstream = torch.randn(200, 2, 32)
    packed = gradients(ours(backend, causal=causal, cu_seqlens=cu_seqlens, max_seqlen=129), inputs, upstream)
    alone = []
    for first, last in itertools.pairwise(offsets):
        part = [x[first:last].unsqueeze(0) for x in inputs]
        results = gradients(ours(backend, causal=causal), part, upstream[first:last].unsqueeze(0))
        alone.append([x.squeeze(0) for x in results])
    for what, actual, parts in zip(["output", *NAMES], packed, zip(*alone, strict=True), strict=True):
        if backend != "torch":
            assert torch.equal(actual, torch.cat(parts)), what
        else:
            torch.testing.assert_close(actual, torch.cat(parts), msg=what)


def test_packed_dropout_matches_the_reference_and_counts_sequences(isa):
    cu_seqlens = torch.tensor([0, 40, 40, 110, 240])
    inputs = [x[0] for x in qkv(1, 240, 240, 3, 40)]
    options = {"causal": True, "dropout_p": 0.3, "cu_seqlens": cu_seqlens}
    assert_same_math(ours(**options), ours("torch", **options), inputs, NAMES)
    dense = qkv(3, 50, 50, 2, 32)
    rows = [x.flatten(0, 1) for x in dense]
    out = ours(dropout_p=0.3, cu_seqlens=torch.arange(4) * 50)(*rows)
    assert torch.equal(out, ours(dropout_p=0.3)(*dense).flatten(0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_inputs(backend):
    for batch, queries, keys in [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0)]:
        inputs = qkv(batch, queries, keys, 2, 16)
        for causal in (False, True):
            options = {"causal": causal, "dropout_p": 0.5}
            for result in gradients(ours(backend, **options), inputs, torch.ones(batch, queries, 2, 16)):
                assert torch.equal(result, torch.zeros_like(result))
    for offsets in ([0], [0, 0, 0]):
        inputs = [torch.randn(0, 2, 16) for _ in NAMES]
        results = gradients(ours(backend, cu_seqlens=torch.tensor(offsets)), inputs, torch.ones(0, 2, 16))
        assert all(result.shape == (0, 2, 16) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_rows_that_see_no_key_give_zero(isa, dtype, dropout_p):
    queries, keys = 150, 20  # the first 130 queries see nothing: whole blocks and part of one
    inputs = qkv(2, queries, keys, 2, 32, dtype)
    options = {"causal": True, "dropout_p": dropout_p}
    upstream = torch.randn(2, queries, 2, 32).to(dtype)
    out, dquery, _, _ = gradients(ours(**options), inputs, upstream)
    assert torch.equal(out[:, :130], torch.zeros_like(out[:, :130]))
    assert torch.equal(dquery[:, :130], torch.zeros_like(out[:, :130]))
    upstream[:, :130] = 1e4  # what comes back to them must not reach the keys
    assert_same_math(ours(**options), ours("torch", **options), inputs, NAMES)
    for actual, expected in zip(
        gradients(ours(**options), inputs, upstream)[2:],
        gradients(ours(**options), inputs, torch.cat([upstream[:, :130] * 0, upstream[:, 130:]], 1))[2:],
        strict=True,
    ):
        assert torch.equal(actual, expected)


@cpp_only  # the others subtract two roundings of the same number
@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (150, 90), (9, 1)])
def test_a_query_that_sees_one_key_gets_exactly_no_gradient(isa, queries, keys):
    """Its weight is 1 whatever the score."""
    inputs = [x * 10 for x in qkv(2, queries, keys, 2, 64)]
    _, dquery, dkey, _ = gradients(ours(causal=keys > 1), inputs, torch.randn(2, queries, 2, 64))
    only = slice(queries - keys, queries - keys + 1) if keys > 1 else slice(None)
    assert torch.equal(dquery[:, only], torch.zeros_like(dquery[:, only]))
    if keys == 1:
        assert torch.equal(dkey, torch.zeros_like(dkey))


@pytest.mark.parametrize("scale", [1.0, -0.3, 0.0])
def test_scale(isa, scale):
    assert_same_math(ours(scale=scale), stock(scale=scale), qkv(1, 40, 40, 2, 32), NAMES)


def test_large_scores_neither_overflow_nor_lose_the_softmax(isa):
    query, key, value = qkv(1, 80, 400, 1, 64)
    ramp = torch.linspace(0.1, 30, 400).view(1, -1, 1, 1)  # row maxima keep rising from block to block
    assert_same_math(ours(), stock(), [query.abs() * 3, key.abs() * ramp, value], NAMES)


@needs_fused
@settings(max_examples=either(80, 8), deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_stride_and_option(data):
    draw = data.draw
    lengths = st.one_of(st.integers(0, 20), st.integers(60, 70), st.integers(120, 140))
    packed = draw(st.booleans(), "packed")
    heads, head_dim = draw(st.integers(1, 3), "heads"), draw(st.integers(16, 128), "head_dim")
    dtype = draw(st.sampled_from(DTYPES), "dtype")
    options = {
        "causal": draw(st.booleans(), "causal"),
        "window": draw(st.sampled_from([None, None, 0, 3, 64, 100]), "window"),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.1, 0.5]), "dropout_p"),
        "scale": draw(st.sampled_from([None, 0.2, -0.1]), "scale"),
    }
    if packed:
        sequences = draw(st.lists(lengths, min_size=1, max_size=4), "sequences")
        options["cu_seqlens"] = torch.tensor([0, *torch.tensor(sequences).cumsum(0).tolist()])
        leading = [(sum(sequences),)] * 3
    else:
        batch, queries, keys = draw(st.integers(1, 2), "batch"), draw(lengths, "queries"), draw(lengths, "keys")
        leading = [(batch, queries), (batch, keys), (batch, keys)]
    torch.manual_seed(draw(st.integers(0, 2**32), "seed"))
    layout = draw(st.sampled_from(["contiguous", "heads first", "padded"]), "layout")
    inputs = []
    for shape in leading:
        x = torch.randn(*shape, heads, head_dim).to(dtype)
        if layout == "heads first":
            x = x.transpose(-2, -3).contiguous().transpose(-2, -3)
        elif layout == "padded":
            x = F.pad(x, (1, 2))[..., 1:-2]
        inputs.append(x)
    upstream = torch.randn(*leading[0], heads, head_dim).to(dtype)
    reference = ours("torch", **options)
    exact = gradients(reference, [x.double() for x in inputs], upstream.double())
    actual, expected = gradients(ours(**options), inputs, upstream), gradients(reference, inputs, upstream)
    for what, a, e, truth in zip(["output", *NAMES], actual, expected, exact, strict=True):
        # Of 960 such comparisons 11 exceeded the plain budget, by at most 1.8 times: one matrix has few elements.
        assert_parity(a, e, truth, what, slack=SWEEP_SLACK)


@cpp_only
@needs_fused
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "head_dim", "dtype"),
    [
        (1, 1300, 1300, 1, 64, torch.float32),  # three segments of keys, one head: the threads share it
        (1, 900, 1100, 3, 128, torch.bfloat16),  # segments of 256
        (4, 65, 65, 3, 40, torch.float32),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_bits_do_not_depend_on_threads(batch, queries, keys, heads, head_dim, dtype, causal):
    inputs = qkv(batch, queries, keys, heads, head_dim, dtype)
    upstream = torch.randn(batch, queries, heads, head_dim).to(dtype)
    results = []
    for threads in (1, 2, 5, 2):
        torch.set_num_threads(threads)
        try:
            results.append(gradients(ours(causal=causal, dropout_p=0.1), inputs, upstream))
        finally:
            torch.set_num_threads(2)
    for other in results[1:]:
        for what, a, b in zip(["output", *NAMES], results[0], other, strict=True):
            assert torch.equal(a, b), what


@pytest.mark.parametrize("packed", [False, True])
def test_packed_qkv_is_attention_of_its_parts(packed):
    torch.manual_seed(0)
    x = torch.randn(130, 3, 2, 48) if packed else torch.randn(2, 65, 3, 2, 48)
    options = {"causal": True, "window": 20, "dropout_p": 0.2}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 100, 130])
    upstream = torch.randn(*x.shape[:-3], 2, 48)
    for backend in ops.available_backends("attention"):

        def joint(x, backend=backend):
            torch.manual_seed(3)
            return ops.attention_packed_qkv(x, backend=backend, **options)

        def separate(x, backend=backend):
            return ours(backend, **options)(*x.unbind(-3))

        for actual, expected in zip(gradients(joint, [x], upstream), gradients(separate, [x], upstream), strict=True):
            assert torch.equal(actual, expected), backend


@needs_fused
def test_only_needed_gradients_are_computed():
    inputs = qkv(2, 40, 70, 2, 32)
    upstream = torch.randn(2, 40, 2, 32)
    expected = gradients(ours(), inputs, upstream)[1:]
    for wanted in ([0], [1], [2], [0, 2]):
        leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        ours()(*leaves).backward(upstream)
        for i, leaf in enumerate(leaves):
            assert torch.equal(leaf.grad, expected[i]) if i in wanted else leaf.grad is None


def test_checkpointing_regenerates_the_mask():
    inputs = qkv(1, 33, 33, 2, 16)
    upstream = torch.randn(1, 33, 2, 16)

    def rerun(query, key, value):
        torch.manual_seed(3)
        return checkpoint(lambda *x: ops.attention(*x, dropout_p=0.5), query, key, value, use_reentrant=False)

    for actual, expected in zip(
        gradients(rerun, inputs, upstream), gradients(ours(None, dropout_p=0.5), inputs, upstream), strict=True
    ):
        assert torch.equal(actual, expected)


@reference_only
@pytest.mark.parametrize("packed", [False, True])
def test_torch_backend_passes_gradcheck(packed):
    torch.manual_seed(0)
    options = {"causal": True, "dropout_p": 0.3, "backend": "torch"}
    if packed:
        shapes = [(6, 2, 3)] * 3
        options["cu_seqlens"] = torch.tensor([0, 2, 2, 6])
    else:
        shapes = [(1, 4, 2, 3), (1, 3, 2, 3), (1, 3, 2, 3)]  # the first query sees no key
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def function(*inputs):
        torch.manual_seed(1)
        return ops.attention(*inputs, **options)

    assert torch.autograd.gradcheck(function, inputs)


@reference_only
@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_stock_in_float64(causal):
    for queries, keys in [(9, 9), (5, 12)]:
        inputs = [x.double() for x in qkv(2, queries, keys, 3, 20)]
        torch.testing.assert_close(ours("torch", causal=causal)(*inputs), stock(causal)(*inputs), rtol=0, atol=1e-14)


@reference_only
def test_reference_drops_what_the_specification_says():
    query, key, value = (x.double() for x in qkv(2, 5, 140, 3, 16))
    seed = draw_same_seed(3)
    weights = torch.einsum("bqhd,bkhd->bhqk", query, key).mul(0.25).softmax(-1)
    kept = attention_keep_mask(torch.arange(5), torch.arange(6).view(2, 3, 1), 140, seed, 0.3)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights * kept * keep_scale(0.3), value)
    actual = ours("torch", dropout_p=0.3)(query, key, value)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)


def test_opcheck(isa):
    query, key, value = qkv(2, 9, 14, 2, 20)
    seed = torch.tensor([3])
    for requires_grad in (False, True):
        inputs = [x.clone().requires_grad_(requires_grad) for x in (query, key, value)]
        args = (*inputs, *Call(seed=seed, causal=True, scale=0.2, dropout_p=0.1, window=3), FUSED)
        torch.library.opcheck(torch.ops.fasttune.attention.default, args)
        rows = [x[0].detach().clone().requires_grad_(requires_grad) for x in qkv(1, 9, 9, 2, 20)]
        offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
        args = (*rows, *Call(offsets, max_seqlen=5, scale=0.2), FUSED)
        torch.library.opcheck(torch.ops.fasttune.attention.default, args)
        x = torch.randn(2, 9, 3, 2, 20, requires_grad=requires_grad)
        args = (x, None, None, *Call(seed=seed, causal=True, scale=0.2, dropout_p=0.1), FUSED)
        torch.library.opcheck(torch.ops.fasttune.attention.default, args)
    call = Call(seed=seed, causal=True, scale=0.2, dropout_p=0.1, window=3)
    saved = (query, key, value, *_attention._run(query, key, value, *call, FUSED))
    dout = torch.randn(2, 9, 2, 20)
    for needed in ([True] * 6, [False, True, False] * 2):
        args = (dout, *saved, *call, needed, FUSED)
        torch.library.opcheck(torch.ops.fasttune.attention_backward.default, args)
        assert len(_attention_backward(*args)) == 6
    x = torch.randn(2, 9, 3, 2, 20)
    out, lse = _attention._run(x, None, None, *call, FUSED)
    args = (dout, x, None, None, out, lse, *call, [True, *[False] * 5], FUSED)
    torch.library.opcheck(torch.ops.fasttune.attention_backward.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend):
    options = {"dropout_p": 0.2, "causal": True, "window": 4, "backend": backend}
    cu_seqlens = torch.tensor([0, 10, 33])

    def function(query, key, value):
        dense = ops.attention(query, key, value, **options)
        return dense + ops.attention(query[0], key[0], value[0], cu_seqlens=cu_seqlens, **options)

    def seeded(function):
        def run(*inputs):
            torch.manual_seed(2)
            return function(*inputs)

        return run

    inputs, upstream = qkv(2, 33, 33, 2, 16), torch.randn(2, 33, 2, 16)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        gradients(seeded(compiled), inputs, upstream), gradients(seeded(function), inputs, upstream), strict=True
    ):
        torch.testing.assert_close(actual, expected)


MEMORY = """
import resource, torch
from fasttune import ops
rows = 8192
inputs = [torch.randn(1, rows, 1, 64, requires_grad=True) for _ in range(3)]
def step(n):
    part = [x[:, :n] for x in inputs]
    ops.attention(*part, dropout_p=0.1, causal=True, backend="cpp").sum().backward()
step(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(rows)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@cpp_only
@needs_fused
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has another unit elsewhere")
def test_memory_is_linear_in_the_length():
    grown = int(subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True).stdout)
    tensor = 8192 * 64 * 4
    # Output, three gradients twice (autograd pads each slice), the upstream gradient, partial sums, scratch: about 14
    # tensors; a score matrix would be 128.
    assert grown < 24 * tensor, f"grew by {grown / tensor:.1f} tensors"


def test_kernel_head_dims(monkeypatch):
    monkeypatch.delenv("FASTTUNE_BACKEND", raising=False)
    for head_dim in (8, 136):
        inputs = qkv(1, 5, 5, 2, head_dim)
        assert torch.equal(ops.attention(*inputs), ops.attention(*inputs, backend="torch"))
        if FUSED in ops.available_backends("attention"):
            with pytest.raises(ValueError, match=f"head dimension is {head_dim}; the {FUSED} backend takes 16 to 128"):
                ops.attention(*inputs, backend=FUSED)


def test_autocast_casts_a_mixture():
    query, key, value = qkv(1, 5, 5, 2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.attention(query, key.bfloat16(), value.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="query, key and value are float32, bfloat16, float32; expected one dtype"):
        ops.attention(query, key.bfloat16(), value)


def test_bad_input_is_named():
    query, key, value = qkv(2, 5, 7, 2, 16)
    rows = query[0]

    def raises(error, message, *inputs, **options):
        with pytest.raises(error, match=message):
            ops.attention(*inputs, **options)

    raises(TypeError, "query is int64", query.long(), key, value)
    raises(TypeError, "key is a list; expected a torch.Tensor", query, [1], value)
    raises(ValueError, r"query is .*\(5, 2, 16\).*expected \(B, S, H, D\); \(T, H, D\) goes with", rows, rows, rows)
    raises(ValueError, r"expected \(T, H, D\), because cu_seqlens", query, key, value, cu_seqlens=torch.tensor([0, 5]))
    raises(ValueError, r"key is .*\(1, 7, 2, 16\).*expected shape \(2, 7, 2, 16\)", query, key[:1], value)
    raises(ValueError, r"key is .*\(2, 7, 2, 15\)", query, key[..., :15], value)
    raises(ValueError, r"key is .*\(2, 7, 1, 16\)", query, key[:, :, :1], value)
    raises(ValueError, r"key is .*\(7, 2, 16\)", query, key[0], value)
    raises(
        ValueError, r"value is .*\(2, 6, 2, 16\).*expected shape \(2, 7, 2, 16\) \(like key\)", query, key, value[:, :6]
    )
    raises(ValueError, "value is .* on meta; expected it on cpu like query", query, key, value.to("meta"))
    raises(ValueError, "dropout_p is 1.5", query, key, value, dropout_p=1.5)
    raises(ValueError, "window is -1; expected an integer of at least 0, or None", query, key, value, window=-1)
    raises(TypeError, "window is 1.5; expected an integer", query, key, value, window=1.5)
    raises(TypeError, "window is True; expected an integer", query, key, value, window=True)
    raises(ValueError, "max_seqlen is 5 without cu_seqlens", query, key, value, max_seqlen=5)
    raises(ValueError, r"key is .*expected shape \(5, 2, 16\)", rows, key[0], key[0], cu_seqlens=torch.tensor([0, 5]))
    for backend in ops.available_backends("attention"):

        def packed(error, message, cu_seqlens, backend=backend, **options):
            raises(error, message, rows, rows, rows, cu_seqlens=cu_seqlens, backend=backend, **options)

        packed(TypeError, "cu_seqlens is float32.*expected int32 or int64", torch.tensor([0.0, 5.0]))
        packed(ValueError, r"cu_seqlens is .*\(1, 2\).*expected shape \(N \+ 1,\)", torch.tensor([[0, 5]]))
        packed(ValueError, r"expected shape \(N \+ 1,\)", torch.tensor([], dtype=torch.int64))
        packed(ValueError, "cu_seqlens runs from 0 to 4; expected 0 to 5", torch.tensor([0, 4]))
        packed(ValueError, "cu_seqlens runs from 1 to 5; expected 0 to 5", torch.tensor([1, 5]))
        packed(ValueError, "cu_seqlens falls from 4 to 3 at position 2", torch.tensor([0, 4, 3, 5]))
        packed(ValueError, "cu_seqlens runs from 0 to 9", torch.tensor([0, 9]))
        packed(ValueError, "on meta; expected it on cpu", torch.tensor([0, 5]).to("meta"))
        packed(ValueError, "max_seqlen is 3, but .* length 5", torch.tensor([0, 5]), max_seqlen=3)
    with pytest.raises(ValueError, match=r"qkv is .*expected shape \(2, 5, 3, 2, 16\)"):
        ops.attention_packed_qkv(torch.randn(2, 5, 2, 2, 16))
    with pytest.raises(ValueError, match="window is -2; expected"):
        ops.attention_packed_qkv(torch.randn(2, 5, 3, 2, 16), window=-2)
