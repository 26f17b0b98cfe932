"""ops.attention with terms of the scores: a bias by distance, and the two relative terms of disentangled attention."""

import itertools

import pytest
import torch
from behind_keys import FIRST, LAST
from fused import BACKENDS, FUSED, cpp_only, either, needs_fused, reference_only
from oracle import DTYPES, SWEEP_SLACK, assert_same_math

from fasttune import ops

TERMS = ["bias", "c2p", "p2c"]
SETS = [("bias",), ("c2p",), ("p2c",), ("c2p", "p2c"), ("bias", "c2p", "p2c")]


def buckets_of(furthest, width):
    """As DeBERTa's: near distances have a bucket each, far ones share it, all in order."""
    distance = torch.arange(-furthest, furthest + 1)
    near = max(width // 4, 1)
    shared = near + ((distance.abs() - near).clamp(min=0) / 3).long()
    bucket = torch.where(distance.abs() <= near, distance.abs(), shared) * distance.sign() + width // 2
    return bucket.clamp(0, width - 1).int()


def at(table, furthest, queries, keys):
    """table (2 R + 1, ...) -> (Q, K, ...), aligned at the last query and the last key."""
    ahead = torch.arange(keys) - torch.arange(keys - queries, keys)[:, None]
    return table[ahead.clamp(-furthest, furthest) + furthest]


def stock(terms, furthest, buckets=None, causal=False, window=None):
    """Every score written down, in the inputs' dtype."""

    def function(query, key, value, *given):
        of = dict(zip(terms, given, strict=True))
        queries, keys = query.shape[1], key.shape[1]
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        scores = q @ k.transpose(-1, -2)
        if buckets is not None:
            index = at(buckets.long(), furthest, queries, keys).expand(scores.shape)
            if "c2p" in of:
                scores = scores + of["c2p"].transpose(1, 2).gather(-1, index)
            if "p2c" in of:
                scores = scores + of["p2c"].transpose(1, 2).gather(-1, index.transpose(-1, -2)).transpose(-1, -2)
        scores = scores * query.shape[-1] ** -0.5
        if "bias" in of:
            scores = scores + at(of["bias"].t(), furthest, queries, keys).permute(2, 0, 1)
        ahead = torch.arange(keys) - torch.arange(keys - queries, keys)[:, None]
        hidden = (ahead > 0) & causal
        if window is not None:
            hidden = hidden | (ahead.abs() > window)
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(hidden, 0.0)
        return (weights @ v).transpose(1, 2)

    return function


def ours(terms, backend=FUSED, seed=3, **options):
    def function(query, key, value, *given):
        torch.manual_seed(seed)
        of = dict(zip(terms, given, strict=True))
        return ops.attention(query, key, value, backend=backend, **of, **options)

    return function


def inputs_of(terms, batch, queries, keys, heads, head_dim, furthest, width, dtype=torch.float32):
    """query, key, value and the terms; scores of about the size that a trained model has."""
    torch.manual_seed(0)
    of = {
        "bias": torch.randn(heads, 2 * furthest + 1),
        "c2p": torch.randn(batch, queries, heads, width) * head_dim**0.5,
        "p2c": torch.randn(batch, keys, heads, width) * head_dim**0.5,
    }
    tensors = [torch.randn(batch, rows, heads, head_dim) for rows in (queries, keys, keys)]
    return [x.to(dtype) for x in (*tensors, *(of[term] for term in terms))]


def options_of(terms, furthest, width):
    return {} if terms == ("bias",) else {"buckets": buckets_of(furthest, width)}


def names(terms):
    return ["query", "key", "value", *terms]


def gradients(function, inputs, upstream):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


# Distances that reach nothing, a vector, a block, over everything; a number of buckets off a vector's. 150 keys take
# three blocks of C++, two of Triton's.
CASES = [
    *((terms, *sizes, torch.float32) for terms in (SETS[0], SETS[4]) for sizes in [(0, 1), (64, 50), (300, 128)]),
    *((terms, 9, 7, torch.float32) for terms in SETS),
    *((terms, 9, 7, dtype) for terms in (SETS[0], SETS[4]) for dtype in DTYPES[1:]),
]


@pytest.mark.parametrize(
    ("terms", "furthest", "width", "dtype"),
    either(CASES, [(terms, *sizes, torch.bfloat16) for terms in (SETS[0], SETS[4]) for sizes in [(9, 7), (300, 128)]]),
)
def test_matches_stock(isa, terms, furthest, width, dtype):
    for queries, keys, head_dim in either([(67, 67, 17), (67, 150, 64), (150, 70, 40)], [(67, 150, 64)]):
        inputs = inputs_of(terms, 2, queries, keys, 2, head_dim, furthest, width, dtype)
        options = options_of(terms, furthest, width)
        # A bias's gradient sums thousands of numbers one after the other, stock's in a tree.
        assert_same_math(ours(terms, **options), stock(terms, furthest, **options), inputs, names(terms), SWEEP_SLACK)


@pytest.mark.parametrize("terms", either([SETS[0], SETS[3]], [SETS[4]]))
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, 20), (True, 64)])
def test_with_hidden_keys(isa, terms, causal, window):
    furthest, width = 40, 33
    for queries, keys in either([(67, 150), (150, 70)], [(67, 150)]):
        inputs = inputs_of(terms, 1, queries, keys, 2, 32, furthest, width)
        options = options_of(terms, furthest, width)
        hidden = {"causal": causal, "window": window}
        expected = stock(terms, furthest, **options, **hidden)
        assert_same_math(ours(terms, **options, **hidden), expected, inputs, names(terms), SWEEP_SLACK)


# C++: three chunks of queries and three segments of keys. Triton, interpreted: several tiles of each kind. The others
# of SETS would take their time and meet no other edge.
@pytest.mark.parametrize("terms", either([SETS[0], SETS[4]], SETS[4:]))
@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences_with_dropout(isa, terms, causal):
    rows, furthest, width = *either((1300, 200), (300, 60)), 64
    inputs = inputs_of(terms, 1, rows, rows, 1, either(64, 16), furthest, width)
    options = {"causal": causal, "dropout_p": 0.2, **options_of(terms, furthest, width)}
    assert_same_math(ours(terms, **options), ours(terms, "torch", **options), inputs, names(terms), SWEEP_SLACK)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("terms", either([SETS[0], SETS[3]], [SETS[4]]))
def test_packed_is_each_sequence_alone(isa, backend, terms):
    offsets, furthest, width = [0, 0, 5, 70, 70, 71, 200, 200], 30, 25
    offsets += [200 + row for row in range(2, either(150, 0), 3)]  # more than a block of them
    rows = offsets[-1]
    inputs = inputs_of(terms, 1, rows, rows, 2, 32, furthest, width)
    inputs = [x if name == "bias" else x[0] for name, x in zip(names(terms), inputs, strict=True)]
    upstream, options = torch.randn(rows, 2, 32), options_of(terms, furthest, width)
    packed = gradients(ours(terms, backend, cu_seqlens=torch.tensor(offsets), **options), inputs, upstream)
    alone = []
    for first, last in itertools.pairwise(offsets):
        part = [
            x if name == "bias" else x[first:last].unsqueeze(0) for name, x in zip(names(terms), inputs, strict=True)
        ]
        alone.append(gradients(ours(terms, backend, **options), part, upstream[first:last].unsqueeze(0)))
    for what, actual, parts in zip(["output", *names(terms)], packed, zip(*alone, strict=True), strict=True):
        if what == "bias":
            torch.testing.assert_close(actual, sum(parts), rtol=1e-4, atol=1e-5, msg=what)
        elif backend == "torch":
            torch.testing.assert_close(actual, torch.cat([x[0] for x in parts]), msg=what)
        else:
            assert torch.equal(actual, torch.cat([x[0] for x in parts])), what


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("terms", either([SETS[0], SETS[3]], [SETS[4]]))
@pytest.mark.parametrize("hidden", [{}, {"window": 9}, {"causal": True}])
def test_chosen_queries_inside_before_and_behind(isa, backend, terms, hidden):
    """Each query by itself, over the keys of its sequence."""
    lengths, furthest, width = [9, 150, 0, 40], 30, 25
    positions = [
        [FIRST, -7, -1, 0, 8, 9, LAST],
        [*range(-20, 170, 7), *range(180, 200)],
        [-1, 3],
        [0, 1, 1, 39, 39, 60],
    ]
    cu, cu_q = (torch.tensor([0, *x]).cumsum(0) for x in (lengths, list(map(len, positions))))
    flat = torch.tensor([place for places in positions for place in places])
    everything = inputs_of(terms, 1, flat.numel(), sum(lengths), 2, 32, furthest, width)
    inputs = [x if name == "bias" else x[0] for name, x in zip(names(terms), everything, strict=True)]
    options = {**options_of(terms, furthest, width), **hidden}
    chosen = {"cu_seqlens": cu, "cu_seqlens_q": cu_q, "positions_q": flat}

    def expected(query, key, value, *given):
        outs = []
        for n, places in enumerate(positions):
            if not lengths[n]:
                outs.append(torch.zeros_like(query[cu_q[n] : cu_q[n + 1]]))
                continue
            for i, place in zip(range(int(cu_q[n]), int(cu_q[n + 1])), places, strict=True):
                k, v = (x[cu[n] : cu[n + 1]].transpose(0, 1) for x in (key, value))
                ahead = torch.arange(lengths[n]) - place
                index = ahead.clamp(-furthest, furthest) + furthest
                scores = (query[i].unsqueeze(1) @ k.transpose(-1, -2)).squeeze(1)
                of = dict(zip(terms, given, strict=True))
                if "c2p" in of:
                    scores = scores + of["c2p"][i][:, options["buckets"][index].long()]
                if "p2c" in of:
                    own = of["p2c"][cu[n] : cu[n + 1]].transpose(0, 1)  # (H, K, W)
                    chosen_buckets = options["buckets"][index].long()[None, :, None].expand(2, -1, 1)
                    scores = scores + own.gather(-1, chosen_buckets).squeeze(-1)
                scores = scores * query.shape[-1] ** -0.5
                if "bias" in of:
                    scores = scores + of["bias"][:, index]
                seen = (ahead.abs() <= options.get("window", 2**40)) & ~((ahead > 0) & options.get("causal", False))
                weights = scores.masked_fill(~seen, -1e30).softmax(-1).masked_fill(~seen, 0.0)
                outs.append((weights.unsqueeze(1) @ v).squeeze(1).unsqueeze(0))
        return torch.cat(outs)

    assert_same_math(ours(terms, backend, **options, **chosen), expected, inputs, names(terms), SWEEP_SLACK)


MAPS = {
    "in no order": lambda distances, width: torch.randint(width, (distances,)),
    "falling": lambda distances, width: torch.arange(distances - 1, -1, -1) * (width - 1) // (distances - 1),
    "in steps of two": lambda distances, width: torch.arange(0, 2 * distances, 2) % width,
    "one": lambda distances, width: torch.full((distances,), width - 1),
}


@pytest.mark.parametrize("of", MAPS)
def test_any_map_of_distances_to_buckets(isa, of):
    terms, furthest, width = SETS[4], 40, 70
    inputs = inputs_of(terms, 1, 67, 90, 2, 32, furthest, width)
    options = {"buckets": MAPS[of](2 * furthest + 1, width).int()}
    assert_same_math(ours(terms, **options), stock(terms, furthest, **options), inputs, names(terms), SWEEP_SLACK)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_may_reach_further_than_another(isa, backend):
    """A longer table whose ends repeat gives the same, whatever the other table's length."""
    terms, furthest, width = SETS[4], 30, 25
    query, key, value, bias, c2p, p2c = inputs_of(terms, 1, 70, 70, 2, 32, furthest, width)
    options, outs = options_of(terms, furthest, width), []
    for reach in (furthest, furthest + 7, furthest + 170):
        longer = torch.nn.functional.pad(bias, (reach - furthest,) * 2, mode="replicate")
        outs.append(ours(terms, backend, **options)(query, key, value, longer, c2p, p2c))
    assert all(torch.equal(out, outs[0]) for out in outs)


@cpp_only  # the others subtract two roundings of the same number
@needs_fused
def test_who_sees_one_key_passes_no_gradient_to_scores(isa):
    terms, furthest, width = SETS[4], 30, 25
    inputs = inputs_of(terms, 1, 70, 70, 2, 32, furthest, width)
    run = ours(terms, window=0, **options_of(terms, furthest, width))
    found = dict(zip(names(terms), gradients(run, inputs, torch.randn(1, 70, 2, 32))[1:], strict=True))
    assert (found.pop("value") != 0).all()
    assert all((gradient == 0).all() for gradient in found.values())


@needs_fused
@pytest.mark.parametrize("needed", [("bias",), ("c2p",), ("p2c", "query"), ("value",), ("bias", "key")])
def test_gradients_that_are_not_needed_change_nothing(isa, needed):
    terms, furthest, width = SETS[4], 30, 25
    inputs = inputs_of(terms, 1, 70, 70, 2, 32, furthest, width)
    upstream, run = torch.randn(1, 70, 2, 32), ours(terms, **options_of(terms, furthest, width))
    every = dict(zip(names(terms), gradients(run, inputs, upstream)[1:], strict=True))
    leaves = [x.clone().requires_grad_(name in needed) for name, x in zip(names(terms), inputs, strict=True)]
    run(*leaves).backward(upstream)
    for name, leaf in zip(names(terms), leaves, strict=True):
        assert (leaf.grad is None) == (name not in needed)
        assert name not in needed or torch.equal(leaf.grad, every[name]), name


@needs_fused
def test_strides_of_the_terms(isa):
    """(B, H, S, W) as a product of heads leaves it, transposed; a slice of the buckets; a column of everything else."""
    terms, furthest, width = SETS[4], 30, 25
    inputs = inputs_of(terms, 2, 70, 70, 2, 32, furthest, width)
    upstream, run = torch.randn(2, 70, 2, 32), ours(terms, **options_of(terms, furthest, width))
    expected = gradients(run, inputs, upstream)
    bias, c2p, p2c = inputs[3:]
    wide = torch.randn(2, 70, 2, 2 * width)
    wide[..., 3 : 3 + width] = c2p
    apart = torch.randn(2, 70, 2, width, 2)
    apart[..., 1] = p2c
    for strided in (
        (bias.t().contiguous().t(), c2p.transpose(1, 2).contiguous().transpose(1, 2), apart[..., 1]),
        (bias, wide[..., 3 : 3 + width], p2c.transpose(1, 2).contiguous().transpose(1, 2)),
    ):
        assert all(map(torch.equal, gradients(run, [*inputs[:3], *strided], upstream), expected))


@needs_fused
def test_packed_qkv_is_the_same(isa):
    terms, furthest, width = SETS[4], 30, 25
    qkv = torch.randn(2, 70, 3, 2, 32)
    of = dict(zip(terms, inputs_of(terms, 2, 70, 70, 2, 32, furthest, width)[3:], strict=True))
    options = {"backend": FUSED, **options_of(terms, furthest, width)}
    one = ops.attention_packed_qkv(qkv, **of, **options)
    assert torch.equal(one, ops.attention(*qkv.unbind(2), **of, **options))


@cpp_only
@needs_fused
@pytest.mark.parametrize("terms", SETS)
def test_bits_do_not_depend_on_threads(terms):
    """One head, three segments of 512 keys, or six of 256."""
    for head_dim, dtype in [(64, torch.float32), (128, torch.bfloat16)]:
        inputs = inputs_of(terms, 1, 1300, 1400, 1, head_dim, 200, 64, dtype)
        upstream, results = torch.randn(1, 1300, 1, head_dim).to(dtype), []
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            try:
                run = ours(terms, dropout_p=0.1, **options_of(terms, 200, 64))
                results.append(gradients(run, inputs, upstream))
            finally:
                torch.set_num_threads(2)
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


@reference_only
@pytest.mark.parametrize("terms", SETS)
def test_reference_is_stock_in_float64(terms):
    for queries, keys, furthest, width in [(9, 9, 4, 6), (5, 12, 20, 30), (12, 5, 0, 1)]:
        inputs = [x.double() for x in inputs_of(terms, 2, queries, keys, 3, 20, furthest, width)]
        options = options_of(terms, furthest, width)
        actual, expected = ours(terms, "torch", **options)(*inputs), stock(terms, furthest, **options)(*inputs)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@reference_only
def test_torch_backend_passes_gradcheck():
    terms, furthest, width = SETS[4], 2, 4
    inputs = [x.double().requires_grad_() for x in inputs_of(terms, 1, 6, 3, 2, 3, furthest, width)]
    options = options_of(terms, furthest, width)
    assert torch.autograd.gradcheck(ours(terms, "torch", causal=True, dropout_p=0.3, **options), inputs)


@reference_only
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bias": torch.zeros(2, 4)}, r"bias is .*; expected shape \(2, 2 R \+ 1\)"),
        ({"bias": torch.zeros(3, 5)}, r"bias is .*; expected shape \(2, 2 R \+ 1\)"),
        ({"c2p": torch.zeros(1, 3, 2, 4)}, "buckets says which"),
        ({"buckets": torch.zeros(3, dtype=torch.int32)}, "buckets says which"),
        ({"c2p": torch.zeros(1, 4, 2, 4), "buckets": torch.zeros(3, dtype=torch.int32)}, "c2p"),
        ({"p2c": torch.zeros(1, 5, 2, 4), "buckets": torch.full((3,), 4)}, "buckets holds 4 to 4; expected 0 to 3"),
        ({"p2c": torch.zeros(1, 5, 2, 4), "buckets": torch.zeros(2, dtype=torch.int32)}, "buckets is"),
        ({"p2c": torch.zeros(1, 5, 2, 4), "buckets": torch.zeros(3)}, "buckets is"),
        (
            {"c2p": torch.zeros(1, 3, 2, 4), "p2c": torch.zeros(1, 5, 2, 5), "buckets": torch.zeros(3).int()},
            "p2c",
        ),
    ],
)
def test_terms_that_do_not_fit(given, message):
    query, key = torch.zeros(1, 3, 2, 16), torch.zeros(1, 5, 2, 16)
    with pytest.raises(ValueError, match=message):
        ops.attention(query, key, key, **given)
