"""ops.embedding against torch's own embedding, LayerNorm and dropout, and the tied pair against plain tying."""

import hypothesis.strategies as st
import pytest
import torch
from fused import FUSED, INTERPRETED, cpp_only, either, reference_only
from hypothesis import given, settings
from oracle import DTYPES, SWEEP_SLACK, assert_same_math
from torch.nn import functional as F

from fasttune import ops
from fasttune.ops.tied import tied_views

NAMES = ["word", "token_type", "position", "norm_weight", "norm_bias"]


def make(shape=(3, 5), columns=40, dtype=torch.float32, words=17):
    torch.manual_seed(0)
    tables = [torch.randn(n, columns).to(dtype) for n in (words, 2, 9)]
    norm = [torch.rand(columns).to(dtype) + 0.5, torch.randn(columns).to(dtype)]
    ids = torch.randint(words, shape), torch.randint(2, shape), torch.arange(shape[-1])[None] % 9
    return ids, [*tables, *norm]


def fused(ids, backend=FUSED, **options):
    def function(word, token_type, position, norm_weight, norm_bias):
        return ops.embedding(
            ids[0],
            word,
            token_type_ids=ids[1],
            token_type_weight=token_type,
            position_ids=ids[2],
            position_weight=position,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            backend=backend,
            **options,
        )

    return function


def stock(ids, padding_idx=None):
    def function(word, token_type, position, norm_weight, norm_bias):
        x = F.embedding(ids[0], word, padding_idx=padding_idx) + F.embedding(ids[1], token_type)
        return F.layer_norm(x + F.embedding(ids[2], position), x.shape[-1:], norm_weight, norm_bias, 1e-12)

    return function


@pytest.mark.parametrize("dtype", DTYPES)
# Columns around the vector widths (4, 8, 16) and the block of 128 columns.
@pytest.mark.parametrize("columns", either([7, 16, 100, 128, 131, 300], [7, 128, 300]))
def test_bert_embeddings_match_stock(isa, dtype, columns):
    ids, tensors = make(columns=columns, dtype=dtype)
    assert_same_math(fused(ids), stock(ids), tensors, NAMES)


@pytest.mark.parametrize("padding_idx", [0, 16, 5, -1])
def test_padding_gets_no_gradient(padding_idx):
    ids, tensors = make()
    ids[0][0, :3] = padding_idx % 17
    assert_same_math(fused(ids, padding_idx=padding_idx), stock(ids, padding_idx), tensors, NAMES)


@settings(max_examples=either(40, 8), deadline=None)
@given(rows=st.integers(0, 40), words=st.integers(1, 50), columns=st.integers(1, 140), seed=st.integers(0, 2**31))
def test_lookup_alone_sums_repeated_rows(rows, words, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(words, (rows,), generator=generator)
    weight = torch.randn(words, columns, generator=generator)
    assert_same_math(
        lambda w: ops.embedding(ids, w), lambda w: F.embedding(ids, w), [weight], ["word"], slack=SWEEP_SLACK
    )


def test_sparse_gradient_holds_the_rows_that_occur():
    ids, weight = torch.tensor([[3, 1, 3], [0, 3, 7]]), torch.randn(9, 6, requires_grad=True)
    upstream = torch.randn(2, 3, 6)
    for padding_idx in (None, 3):
        out = ops.embedding(ids, weight, sparse_grad=True, padding_idx=padding_idx, backend=FUSED)
        (grad,) = torch.autograd.grad(out, weight, upstream)
        (dense,) = torch.autograd.grad(F.embedding(ids, weight, padding_idx=padding_idx), weight, upstream)
        assert grad.is_sparse
        assert grad.is_coalesced()
        assert grad.indices()[0].tolist() == ([0, 1, 3, 7] if padding_idx is None else [0, 1, 7])
        assert torch.allclose(grad.to_dense(), dense, rtol=1e-6)


def test_dropout_follows_the_shared_generator():
    ids, tensors = make(columns=130)
    torch.manual_seed(4)
    ours = fused(ids, dropout_p=0.3)(*tensors)
    torch.manual_seed(4)
    expected = fused(ids, backend="torch", dropout_p=0.3)(*tensors)
    assert torch.equal(ours == 0, expected == 0)
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_frozen_tables_get_no_gradient_and_position_may_be_missing():
    ids, tensors = make()
    word, token_type = tensors[0].requires_grad_(), tensors[1]
    ops.embedding(ids[0], word, token_type_ids=ids[1], token_type_weight=token_type).sum().backward()
    assert word.grad is not None
    assert token_type.grad is None


@cpp_only
def test_bits_do_not_depend_on_threads():
    ids, weight = torch.randint(50, (2000,)), torch.randn(50, 300, requires_grad=True)
    upstream = torch.randn(2000, 300)
    grads = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        grads += torch.autograd.grad(ops.embedding(ids, weight), weight, upstream)
    assert torch.equal(*grads)


def test_opcheck_and_one_graph():
    ids, (word, token_type, position, *_) = make(columns=12)
    word.requires_grad_()
    positions = ids[2].expand(3, 5)
    torch.library.opcheck(
        torch.ops.fasttune.embedding_sum.default,
        (ids[0], word, ids[1], token_type, positions, position, 2, False, FUSED),
    )
    torch.library.opcheck(
        torch.ops.fasttune.embedding_gradient.default, (torch.randn(3, 5, 12), ids[0], 17, None, FUSED)
    )
    compiled = torch.compile(lambda w: ops.embedding(ids[0], w), fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(word).sum(), word)
    (expected,) = torch.autograd.grad(F.embedding(ids[0], word).sum(), word)
    assert torch.equal(grad, expected)


@reference_only
def test_gradcheck_of_the_reference():
    ids, tensors = make(columns=3, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(fused(ids, backend="torch"), inputs)


def test_bad_input_is_named():
    ids, weight = torch.tensor([[0, 1], [2, 9]]), torch.randn(5, 4)
    if not INTERPRETED:  # a GPU's tensors are not read back: there the row is NaN
        with pytest.raises(IndexError, match=r"input_ids at position \(1, 1\) is 9; expected a value from 0 to 4"):
            ops.embedding(ids, weight)
        with pytest.raises(IndexError, match=r"token_type_ids at position \(0, 0\) is -1"):
            ops.embedding(ids % 5, weight, token_type_ids=ids - 1, token_type_weight=weight)
    with pytest.raises(TypeError, match="input_ids is float32"):
        ops.embedding(ids.float(), weight)
    with pytest.raises(ValueError, match="position_ids came without position_weight"):
        ops.embedding(ids % 5, weight, position_ids=ids)
    with pytest.raises(ValueError, match=r"position_ids is int64 of shape \(3,\) .* broadcasts to \(2, 2\)"):
        ops.embedding(ids % 5, weight, position_ids=torch.arange(3), position_weight=weight)
    with pytest.raises(ValueError, match=r"token_type_weight is float32 of shape \(5, 3\)"):
        ops.embedding(ids % 5, weight, token_type_ids=ids, token_type_weight=weight[:, :3])
    with pytest.raises(ValueError, match="padding_idx is 5"):
        ops.embedding(ids % 5, weight, padding_idx=5)


def tied_loss(weight, ids, tie, uses=1):
    lookup, head = tied_views(weight) if tie else (weight, weight)
    hidden = ops.embedding(ids, lookup, sparse_grad=tie) if uses != "head" else torch.ones(4, weight.shape[1])
    logits = hidden.square() if uses == "lookup" else (hidden * 1.5) @ head.t()
    return logits.sigmoid().sum()


@pytest.mark.parametrize("uses", ["both", "head", "lookup"])
@pytest.mark.parametrize("times", [1, 2])
def test_tied_pair_gives_the_gradient_of_plain_tying(uses, times):
    torch.manual_seed(0)
    ids = torch.randint(11, (3, 4))
    weight = torch.randn(11, 6, requires_grad=True)
    grads = []
    for tie in (True, False):
        loss = (
            sum(tied_loss(weight, ids + i, tie, uses) for i in range(0, -times, -1))
            if times == 1
            else (tied_loss(weight, ids, tie, uses) + tied_loss(weight, (ids + 1) % 11, tie, uses))
        )
        first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
        second = torch.autograd.grad(loss, weight)[0]
        assert torch.equal(first, second)
        grads.append(first)
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-6)


class _KeepsItsGradient(torch.autograd.Function):
    """Hands out a gradient that it keeps, as linear_cross_entropy does."""

    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(torch.ones_like(weight))
        return weight.sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0]


def test_a_gradient_that_somebody_else_holds_is_not_written_into():
    weight, ids = torch.randn(5, 3, requires_grad=True), torch.tensor([1, 1, 4])
    expected = torch.ones(5, 3)
    expected[1] += 2
    expected[4] += 1

    lookup, head = tied_views(weight)
    loss = _KeepsItsGradient.apply(head) + ops.embedding(ids, lookup, sparse_grad=True).sum()
    for _ in range(2):  # a saved gradient, used twice
        assert torch.equal(torch.autograd.grad(loss, weight, retain_graph=True)[0], expected)

    kept = []  # a hook that keeps it
    lookup, head = tied_views(weight)
    head.register_hook(kept.append)
    (head * 1 + 0).sum().add(ops.embedding(ids, lookup, sparse_grad=True).sum()).backward()
    assert torch.equal(kept[0], torch.ones(5, 3))
    assert torch.equal(weight.grad, expected)

    upstream = torch.ones(5, 3)  # the caller's own tensor
    lookup, head = tied_views(weight)
    out = ops.embedding(ids, lookup, sparse_grad=True)
    torch.autograd.backward([head, out], [upstream, torch.ones_like(out)])
    assert torch.equal(upstream, torch.ones(5, 3))


def test_an_unshared_gradient_is_written_in_place():
    weight = torch.randn(5, 3, requires_grad=True)
    addresses = []

    class Head(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.sum()

        @staticmethod
        def backward(ctx, grad):
            fresh = torch.ones(5, 3)
            addresses.append(fresh.data_ptr())
            return fresh

    lookup, head = tied_views(weight)
    loss = Head.apply(head) + ops.embedding(torch.tensor([2]), lookup, sparse_grad=True).sum()
    (grad,) = torch.autograd.grad(loss, weight)
    assert addresses == [grad.data_ptr()]
