"""Every kernel past every block, tile, chunk and fold of its own: what is lost at the second edge or the third.

Sizes come from the kernels' constants (tests/blocks.py): two or three whole blocks and a ragged rest. The other tests
stay below some of them, and a kernel that forgets each block's last row passes there.
"""

import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from blocks import cpp, triton
from fused import FUSED, INTERPRETED, cpp_only, either, reference_only, triton_only
from oracle import SWEEP_SLACK, assert_same_math, run

from fasttune import ops
from fasttune.ops._linear_chunks import chunk_rows

# The generator's block of columns, to which the norms and dropout cut their rows, on every backend.
DROPOUT_BLOCK = cpp("simd/philox.inc", "kDropoutBlock")


def lookup(ids, backend, **options):
    return lambda word: ops.embedding(ids, word, backend=backend, **options)


def many_ids(distinct):
    """Each id one to four times, in no order; the id 1 a hundred times besides, as padding or a token type is."""
    ids = torch.arange(distinct).repeat_interleave(torch.arange(distinct) % 4 + 1)
    return torch.cat((ids, torch.ones(100, dtype=torch.int64)))[torch.randperm(ids.numel() + 100)]


def check_embedding_ids(backend):
    # C++ sums 64 distinct ids a task; Triton cuts the sorted rows in pieces of 32, which then hold several ids or one.
    distinct = 3 * cpp("embedding.cpp", "kGroupBlock") + 1
    if INTERPRETED:
        distinct = max(distinct, 6 * triton("embedding", "RUN") + 1)
    ids, weight = many_ids(distinct), torch.randn(distinct + 2, 20)
    assert_same_math(lookup(ids, backend), lambda word: F.embedding(ids, word), [weight], ["word"])
    # The padding's row is cut out of the groups: those on both sides of it, and of a block's edge, stay right.
    for padding_idx in (1, distinct // 3, distinct - 1):
        assert_same_math(
            lookup(ids, backend, padding_idx=padding_idx),
            lambda word, padding_idx=padding_idx: F.embedding(ids, word, padding_idx),
            [weight],
            ["word"],
        )
    dout = torch.randn(ids.numel(), 20)
    _, dense = run(lookup(ids, backend), [weight], dout)
    leaf = weight.clone().requires_grad_()
    (sparse,) = torch.autograd.grad(lookup(ids, backend, sparse_grad=True)(leaf), leaf, dout)
    assert torch.equal(sparse.to_dense(), dense)


def check_embedding_columns(backend):
    # C++: 128 columns a task; Triton: at most 1024 a program. Tables of types and positions as in BERT.
    columns = either(3 * cpp("embedding.cpp", "kColumnBlock") + 5, 2 * 1024 + 5)
    ids = [torch.randint(size, (70,)) for size in (90, 2, 80)]
    tables = [torch.randn(size, columns) for size in (90, 2, 80)]

    def fused(word, token_type, position):
        pairs = {"token_type_ids": ids[1], "token_type_weight": token_type}
        pairs |= {"position_ids": ids[2], "position_weight": position}
        return ops.embedding(ids[0], word, backend=backend, **pairs)

    def stock(*tables, order=(0, 1, 2)):
        return sum(F.embedding(ids[i], tables[i]) for i in order)

    again = [partial(stock, order=(2, 1, 0))]
    assert_same_math(fused, stock, tables, ["word", "token_type", "position"], again=again)


# Rows by columns of the row-wise kernels.
# C++: a task takes 16384 / columns + 1 rows, and 128 tasks at most: then more rows each. 16 rows, then 16 tasks make a
# fold of the sums over rows. Of 1000 columns: 17 rows a task; 18 tasks; more than 128 tasks' worth.
# Triton: tiles of 32 x 128 (GELU) or 4096 elements (norms, dropout) under a grid that strides over them in several
# rounds; a row of 1100 columns is two programs wide where programs split the columns.
SHAPES = either([(300, 1000), (2300, 1000), (40, 3 * DROPOUT_BLOCK + 5)], [(261, 2 * DROPOUT_BLOCK + 3), (30, 1100)])


def upside_down(function, *tensors, rows=1):
    """The same with the rows in the other order, so with other roundings of the sums over rows."""
    return function(*(x.flip(0) for x in tensors[:rows]), *tensors[rows:]).flip(0)


def check_rows(function, rows_of, parameters, names):
    for rows, columns in SHAPES:
        inputs = [torch.randn(rows, columns) for _ in range(rows_of)]
        inputs += [torch.randn(columns) + 1 for _ in range(parameters)]
        stock = function("torch")
        again = [partial(upside_down, stock, rows=rows_of)]
        assert_same_math(function(FUSED), stock, inputs, names, again=again)


def check_bias_gelu(approximate):
    check_rows(
        lambda backend: lambda x, bias: ops.bias_gelu(x, bias, approximate=approximate, backend=backend),
        *(1, 1, ["x", "bias"]),
    )


def check_gated_activation():
    check_rows(
        lambda backend: lambda a, b, bias: ops.gated_activation(a, b, bias=torch.cat((bias, bias)), backend=backend),
        *(2, 1, ["a", "b", "bias"]),
    )


def check_layer_norm():
    check_rows(lambda b: lambda *tensors: ops.layer_norm(*tensors, backend=b), 1, 2, ["x", "weight", "bias"])


def check_norm_and_gelu(operation):
    check_rows(lambda b: lambda *tensors: operation(*tensors, backend=b), 1, 2, ["x", "weight", "bias"])


def check_dropout_add_layer_norm():
    for rows, columns in SHAPES:
        inputs = [torch.randn(rows, columns), torch.randn(rows, columns), torch.randn(columns), torch.randn(columns)]

        def function(backend, *tensors):
            torch.manual_seed(3)
            return ops.dropout_add_layer_norm(*tensors, dropout_p=0.3, backend=backend)

        assert_same_math(
            partial(function, FUSED),
            partial(function, "torch"),
            inputs,
            ["x", "residual", "weight", "bias"],
            SWEEP_SLACK,
        )


def check_dropout():
    for rows, columns in SHAPES:

        def function(backend, x, residual):
            torch.manual_seed(3)
            return ops.dropout(x, dropout_p=0.3, residual=residual, backend=backend)

        inputs = [torch.randn(rows, columns), torch.randn(rows, columns)]
        assert_same_math(partial(function, FUSED), partial(function, "torch"), inputs, ["x", "residual"])


ROW_WISE = {
    "bias_gelu": partial(check_bias_gelu, "none"),
    "bias_gelu tanh": partial(check_bias_gelu, "tanh"),
    "gated_activation": check_gated_activation,
    "layer_norm": check_layer_norm,
    "layer_norm_gelu": partial(check_norm_and_gelu, ops.layer_norm_gelu),
    "gelu_layer_norm": partial(check_norm_and_gelu, ops.gelu_layer_norm),
    "dropout_add_layer_norm": check_dropout_add_layer_norm,
    "dropout": check_dropout,
}


@pytest.mark.parametrize("name", ROW_WISE)
def test_rows_and_columns(isa, name):
    ROW_WISE[name]()


# C++ walks blocks of 1024 classes, in them pairs of vectors, then one vector, then a tail, whose width depends on the
# instruction set: 55 and 43 left over give each of 4, 8 and 16 lanes all of these. Eight rows share a sum of the bias.
# Triton walks tiles of 2048 from the row's first aligned element. A row of 2 * 2048 + 5 classes begins at any remainder
# of 8, and where 6 or 7 elements come before the first aligned one, one whole tile is left and ends of 2053.
BLOCK = cpp("cross_entropy.cpp", "kBlock")
CLASSES = either((3 * BLOCK + 55, 2 * BLOCK + 43), (2 * 2048 + 5,))
ROWS = either(3 * cpp("cross_entropy.h", "kBiasGroup") + 1, 9)


def labels_and_logits(rows, classes):
    """Labels at blocks' edges and in the row's tail; maxima that rise, fall, and lie in each block."""
    edges = [0, classes - 1]
    for block in (1024, 2048):
        edges += [edge for at in range(block, classes, block) for edge in (at - 1, at)]
    target = torch.tensor([edges[row % len(edges)] for row in range(rows)])
    target[rows // 2] = -100
    logits = torch.randn(rows, classes) * 3
    for row in range(rows):
        logits[row, (row * 389) % classes] += 12
    logits[rows - 1] += torch.linspace(-20, 20, classes)
    logits[rows - 2] += torch.linspace(20, -20, classes)
    return target, logits


OPTIONS = [{}, {"label_smoothing": 0.2, "weighted": True, "reduction": "sum"}]


def check_cross_entropy(backend):
    for classes in CLASSES:
        target, logits = labels_and_logits(ROWS, classes)
        for options in OPTIONS:
            options = dict(options)
            weight = torch.rand(classes) + 0.1 if options.pop("weighted", False) else None

            def fused(x, weight=weight, options=options, target=target):
                return ops.cross_entropy(x, target, weight=weight, backend=backend, **options)

            def stock(x, weight=weight, options=options, target=target):
                return F.cross_entropy(x, target, weight=None if weight is None else weight.to(x.dtype), **options)

            assert_same_math(fused, stock, [logits], ["logits"])


def check_linear_cross_entropy(backend):
    classes, features = CLASSES[-1], 24
    rows = ROWS
    if not INTERPRETED:  # three chunks of the real size: some 16 MB of logits each
        most = chunk_rows(10**6, classes, 4 + 4 / cpp("cross_entropy.h", "kBiasGroup"))
        rows = 2 * most + 3
        assert rows > 2 * chunk_rows(rows, classes, 4 + 4 / cpp("cross_entropy.h", "kBiasGroup"))
    target, _ = labels_and_logits(rows, classes)
    target[::7] = -100
    inputs = [torch.randn(rows, features), torch.randn(classes, features) / features**0.5, torch.randn(classes)]

    def fused(x, weight, bias):
        return ops.linear_cross_entropy(x, weight, target, linear_bias=bias, backend=backend)

    def stock(x, weight, bias):
        return F.cross_entropy(F.linear(x, weight, bias), target)

    assert_same_math(fused, stock, inputs, ["input", "weight", "bias"], SWEEP_SLACK)


def check_linear_log_prob(backend):
    """Its row kernels walk the classes as those of cross_entropy do."""
    block = either(cpp("log_prob.cpp", "kBlock"), 2048)
    for classes in either((3 * block + 55, 2 * block + 43), (2 * block + 5,)):
        target, logits = labels_and_logits(ROWS, classes)
        bias, counted = torch.randn(classes), target != -100

        def fused(logits, bias, target=target):
            eye = torch.eye(ROWS, dtype=logits.dtype)  # rows of logits are columns of the weight
            found = ops.linear_log_prob(eye, logits.t(), target, linear_bias=bias, scale=0.8, backend=backend)
            return torch.stack([result.to(logits.dtype) for result in found])

        def stock(logits, bias, target=target, counted=counted):
            logits = (logits + bias) * 0.8
            log_p = torch.log_softmax(logits, -1)
            log_prob = log_p.gather(-1, target.where(counted, 0)[:, None])[:, 0]
            entropy = -(log_p.exp() * log_p).sum(-1)
            top1 = logits.argmax(-1).to(logits.dtype)
            return torch.stack((log_prob, logits.logsumexp(-1), entropy, logits.mean(-1), top1)).where(counted, 0.0)

        for result in range(5):
            sides = (lambda *x, f=f, result=result: f(*x)[result] + 0 * f(*x)[0] for f in (fused, stock))
            assert_same_math(*sides, [logits, bias], ["logits", "bias"], SWEEP_SLACK)


def check_linear_max(backend):
    # C++: blocks of 1024 rows and 512 classes; strips of four vectors; for the weight's gradient 16 classes and folds
    # of 64 sequences, for the input's 256 classes and 256 columns. Triton: 64 tokens, 64 classes; for the gradients 16
    # classes by 128 columns, 32 by 64. Whole numbers: logits are exact, and all agree on the first of equal maxima.
    linear_max = sys.modules["fasttune.ops.linear_max"]
    block_rows, block_classes = linear_max.BLOCK_ROWS, linear_max.LOGITS_BLOCK_CLASSES
    sequences, rows = either((2 * cpp("linear_max.cpp", "kTermsPerFold") + 3, 2 * block_rows + 3), (4, 2 * 64 + 5))
    classes = either(max(2 * block_classes, 2 * cpp("linear_max.cpp", "kChunk")) + 43, 2 * 64 + 43)
    features = either(2 * cpp("linear_max.cpp", "kColumnBlock") + 5, 2 * 128 + 5)
    lengths = [rows - 2 * sequences - 1, *[1, 3, 0, 5] * sequences][:sequences]
    lengths[-1] += rows + 40 - sum(lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    shapes = (int(cu[-1]), features), (classes, features), (classes,)
    inputs = [torch.randint(-1, 2, shape).float() for shape in shapes]
    empty = torch.tensor(lengths)[:, None] == 0

    def fused(*tensors):
        x, weight, bias = tensors
        out = ops.linear_max(x, weight, cu, linear_bias=bias, backend=backend)
        return out.masked_fill(empty, 0.0)

    def stock(*tensors):
        parts = F.linear(*tensors).split(lengths)
        return torch.stack([part.max(0).values if len(part) else part.sum(0) for part in parts])

    def other_way(x, weight, bias):
        order = torch.randperm(classes)
        return stock(x, weight[order], bias[order])[:, order.argsort()]

    assert_same_math(fused, stock, inputs, ["input", "weight", "bias"], SWEEP_SLACK, [other_way])


def sdpa(causal):
    def function(query, key, value):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2]) if causal else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return function


# C++: 512 queries a task where there are enough of them (four tasks a thread, of two threads), in blocks of 64;
# segments of 512 keys forward, and of 32768 / D backward: 256 at D = 128. Triton, interpreted: 64 and 128 queries by
# 128 keys forward and 64 backward; steps of 128 keys where there is dropout.
ATTENTION = either(
    [(2 * 512 + 70, 2 * 512 + 70, 4, 16), (70, 2 * 256 + 67, 2, 128)], [(2 * 128 + 3, 2 * 128 + 35, 1, 16)]
)


def check_attention(backend):
    for queries, keys, heads, head_dim in ATTENTION:
        inputs = [torch.randn(1, rows, heads, head_dim) for rows in (queries, keys, keys)]
        for causal in (False, True):
            assert_same_math(
                lambda *tensors, causal=causal: ops.attention(*tensors, causal=causal, backend=backend),
                *(sdpa(causal), inputs, ["query", "key", "value"], SWEEP_SLACK),
            )


def test_attention_with_dropout(isa):
    for queries, keys, heads, head_dim in ATTENTION:
        inputs = [torch.randn(1, rows, heads, head_dim) for rows in (queries, keys, keys)]

        def function(backend, *tensors):
            torch.manual_seed(3)
            return ops.attention(*tensors, causal=True, dropout_p=0.2, backend=backend)

        assert_same_math(
            partial(function, FUSED), partial(function, "torch"), inputs, ["query", "key", "value"], SWEEP_SLACK
        )


def check_packed_attention(backend):
    """Many sequences and heads; of each the chosen queries, in one sequence more than a block of them."""
    lengths = [1 + 5 * i % 7 for i in range(66)] + [3 * 64 + 5, 2]
    heads, head_dim = either(13, 1), 16
    cu = torch.tensor([0, *lengths]).cumsum(0)
    chosen = [list(range(0, length, 1 + i % 2)) for i, length in enumerate(lengths)]
    flat = torch.tensor([start + at for start, places in zip(cu.tolist(), chosen, strict=False) for at in places])
    cu_q = torch.tensor([0, *map(len, chosen)]).cumsum(0).int()
    positions = torch.tensor([at for places in chosen for at in places], dtype=torch.int32)
    inputs = [torch.randn(int(cu[-1]), heads, head_dim) for _ in range(3)]

    def alone(*tensors):
        parts = zip(*(x.split(lengths) for x in tensors), strict=True)
        return torch.cat([sdpa(True)(*(x[None] for x in part))[0] for part in parts])

    def packed(*tensors):
        return ops.attention(*tensors, cu_seqlens=cu.int(), causal=True, backend=backend)

    def of_chosen(query, key, value):
        rest = {"cu_seqlens": cu.int(), "cu_seqlens_q": cu_q, "positions_q": positions, "causal": True}
        return ops.attention(query[flat], key, value, backend=backend, **rest)

    names = ["query", "key", "value"]
    assert_same_math(packed, alone, inputs, names, SWEEP_SLACK)
    assert_same_math(of_chosen, lambda *tensors: alone(*tensors)[flat], inputs, names, SWEEP_SLACK)


def check_rotary(backend):
    """Triton: 1024 pairs of columns a program, of at most 8 heads, which it walks; wider heads than that in one tile.
    C++: 16384 elements or more a thread, by whole rows."""
    pairs, block = (triton("rotary", "PAIRS"), triton("rotary", "HEADS")) if INTERPRETED else (16384, 8)
    for rows, heads, head_dim, width in (
        (2 * pairs + 3, 1, 2, 2),
        (2 * pairs // (block * 32) + 3, 2 * block + 3, 64, 64),
        (3, 1, 2 * 1024 + 70, 2 * 1024 + 6),
    ):
        cos, sin = torch.randn(2, rows, width).bfloat16().float()

        def fused(x, cos=cos, sin=sin):
            return ops.rotary(x, cos, sin, rotated=2, backend=backend)

        def stock(x, cos=cos, sin=sin, width=width):
            cos, sin = (table[:, None, None].to(x.dtype) for table in (cos, sin))
            part, rest = x[:, :2, :, :width], x[:, :2, :, width:]
            low, high = part.chunk(2, -1)
            part = part * cos + torch.cat((-high, low), -1) * sin
            return torch.cat((torch.cat((part, rest), -1), x[:, 2:]), 1)

        assert_same_math(fused, stock, [torch.randn(rows, 3, heads, head_dim)], ["x"])


CHECKS = {
    "embedding ids": check_embedding_ids,
    "embedding columns": check_embedding_columns,
    "cross_entropy": check_cross_entropy,
    "linear_cross_entropy": check_linear_cross_entropy,
    "linear_log_prob": check_linear_log_prob,
    "linear_max": check_linear_max,
    "attention": check_attention,
    "packed attention": check_packed_attention,
    "rotary": check_rotary,
}


@pytest.mark.parametrize("name", CHECKS)
def test_against_stock(isa, name):
    CHECKS[name](FUSED)


@reference_only
@pytest.mark.parametrize("name", CHECKS)
def test_reference_against_stock(name):
    CHECKS[name]("torch")


# Kernels whose grid or loop only a device with many multiprocessors, or thousands of rows, would take past one tile.
@triton_only
@pytest.mark.parametrize(("block_n", "window"), [(32, None), (64, None), (32, 300)])
def test_a_step_of_dropout_takes_several_tiles_of_keys(monkeypatch, block_n, window):
    """As on GPUs in 16 bits: one counter serves 128 keys, the interpreter's own forward tile has them all. A
    window of 300 leaves tiles on both sides of those that it does not cross."""
    from fasttune.kernels import attention as kernel

    tiles = dict.fromkeys(kernel.INTERPRETED_TILES, kernel.Tiles(32, block_n, 1, 1))
    monkeypatch.setattr(kernel, "INTERPRETED_TILES", tiles)
    inputs = [torch.randn(1, rows, 2, 16).bfloat16() for rows in (40, 3 * 128 + 5, 3 * 128 + 5)]

    def function(backend, *tensors):
        torch.manual_seed(3)
        return ops.attention(*tensors, causal=True, window=window, dropout_p=0.2, backend=backend)

    names = ["query", "key", "value"]
    assert_same_math(partial(function, FUSED), partial(function, "torch"), inputs, names, SWEEP_SLACK)


@triton_only
def test_sums_over_more_programs_than_a_tile_holds():
    from fasttune.kernels.column_sums import COLUMNS, ROWS, column_sums

    partial_sums = torch.randn(2 * ROWS + 3, 3 * COLUMNS + 5)
    exact = partial_sums.double().sum(0)
    error = (column_sums(partial_sums, torch.float32).double() - exact).abs().max()
    assert (
        error <= 2 * (partial_sums.sum(0).double() - exact).abs().max() + torch.finfo(torch.float32).eps * exact.max()
    )


@triton_only
def test_sums_of_losses_over_more_rows_than_a_tile_holds():
    from fasttune.kernels.cross_entropy import loss_sums

    rows = 2 * 1024 + 3  # 1024 rows at a time
    loss, weight, target = torch.rand(rows), torch.rand(7), torch.arange(rows) % 7
    target[::5] = -100
    out, total = torch.empty(()), torch.empty(())
    loss_sums(loss, target, weight, -100, out=out, total=total)
    exact_total = weight.double()[target[target >= 0]].sum()
    bound = 4 * torch.finfo(torch.float32).eps  # three sums a lane, then a tree: a few roundings of positive terms
    torch.testing.assert_close(total.double(), exact_total, rtol=bound, atol=0)
    torch.testing.assert_close(out.double(), loss.double().sum() / exact_total, rtol=2 * bound, atol=0)


@triton_only
def test_scaling_over_several_programs():
    from fasttune.kernels.linear_cross_entropy import scale_in_place

    x = torch.randn(2 * 4096 + 3)  # 4096 elements a program
    assert torch.equal(scale_in_place(x.clone(), torch.tensor(3.0)), x * 3)


def test_rows_are_gathered_past_every_tile():
    # Triton: 4096 elements a program, at most 1024 columns wide; the inverse index 1024 places at a time.
    for rows, columns in ((3 * 32 + 5, 1), (11, 2 * 1024 + 5), (2 * 1024 + 3, 1)):
        x = torch.randn(rows, columns)
        indices = torch.randperm(rows)[: rows - rows // 4].sort().values
        back = torch.zeros(rows, columns)
        back[indices] = x[indices]
        copier = "triton" if INTERPRETED else "torch"
        packed = torch.ops.fasttune.gather_rows(x, indices, rows, copier)
        assert torch.equal(packed, x[indices])
        assert torch.equal(torch.ops.fasttune.scatter_rows(packed, indices, rows, copier), back)


@cpp_only
@pytest.mark.parametrize("position", [0, 63, 64, 1000, 4999])
def test_a_bad_index_is_named_wherever_it_stands(position):
    ids = torch.zeros(5000, dtype=torch.int64)
    ids[position:] = 7
    with pytest.raises(IndexError, match=rf"input_ids at position {position} is 7"):
        ops.embedding(ids, torch.randn(5, 4), backend=FUSED)
    with pytest.raises(IndexError, match=rf"target at position {position} is 7"):
        ops.cross_entropy(torch.randn(5000, 5), ids, backend=FUSED)
