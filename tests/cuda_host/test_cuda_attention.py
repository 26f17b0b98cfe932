"""The CUDA attention, run on the host, against stock torch in the tested dtype and in float64; its dropout's masks."""

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, assert_parity, assert_same_math

from fasttune import ops
from fasttune.ops._attention_call import Call
from fasttune.ops._reference.attention import attention as reference
from fasttune.ops.attention import _attention

NAMES = ("query", "key", "value")


def tensors(*shape, dtype=torch.float32, keys=None):
    keys = shape[1] if keys is None else keys
    return [torch.randn(shape).to(dtype), *(torch.randn(shape[0], keys, *shape[2:]).to(dtype) for _ in range(2))]


def stock(causal):
    def attend(query, key, value):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)

    return attend


def fused(**options):
    return lambda *x: ops.attention(*x, backend="cuda", **options)


# 150: full tiles and a ragged one on both axes; heads of 16 and 40: padded inside; 128: two buckets; 20: no multiple of
# a vector.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "causal"),
    [((1, 150, 2, 64), True), ((2, 130, 1, 40), False), ((1, 100, 1, 128), True), ((1, 70, 1, 16), False),
     ((1, 33, 1, 20), True)],
)  # fmt: skip
def test_matches_stock(shape, causal, dtype):
    assert_same_math(fused(causal=causal), stock(causal), tensors(*shape, dtype=dtype), NAMES)


def test_one_token_attends_to_itself():
    query, key, value = (x.requires_grad_() for x in tensors(1, 1, 1, 16))
    out = fused(causal=True)(query, key, value)
    assert torch.equal(out, value)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, (query, key, value), upstream)
    # dP - delta is 0 but for the order of two sums of 16 products.
    bound = 16 * torch.finfo(torch.float32).eps * (upstream * value).abs().sum() * 0.25
    assert grads[0].abs().max() <= bound * key.abs().max()
    assert grads[1].abs().max() <= bound * query.abs().max()
    assert torch.equal(grads[2], upstream)


# More keys than queries: all see some; fewer: the first 60 queries see none and must give 0, with gradient 0.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(70, 200), (130, 70)])
def test_causal_is_aligned_at_the_end(queries, keys, dtype):
    inputs = tensors(1, queries, 1, 64, keys=keys, dtype=dtype)
    assert_same_math(fused(causal=True), lambda *x: ops.attention(*x, causal=True, backend="torch"), inputs, NAMES)
    assert (fused(causal=True)(*inputs)[:, : max(0, queries - keys)] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("causal", "head_dim"), [(False, 32), (True, 128)])
def test_dropout_is_the_references(causal, head_dim, dtype):
    def attend(backend):
        def attend(*x):
            torch.manual_seed(3)
            return ops.attention(*x, causal=causal, dropout_p=0.2, backend=backend)

        return attend

    assert_same_math(attend("cuda"), attend("torch"), tensors(2, 140, 1, head_dim, dtype=dtype), NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_weights_are_those_of_the_reference_bit_for_bit(dtype):
    # Equal scores and a one-hot value for each key: the output shows which weights were kept.
    keys, seed = 160, torch.tensor([-(2**61) + 9])
    query, value = torch.zeros(1, keys, 2, 128, dtype=dtype), torch.zeros(1, keys, 2, 128, dtype=dtype)
    for first in range(0, keys, 128):
        part = torch.eye(keys)[:, first : first + 128]
        value[0, :, :, : part.shape[1]] = part.unsqueeze(1)
        call = Call(seed=seed, dropout_p=0.3)
        out, _ = _attention._run(query, query, value, *call, "cuda")
        expected = reference(query, query, value, call)
        assert torch.equal(out != 0, expected != 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("index_dtype", "dropout_p"), [(torch.int32, 0.0), (torch.int64, 0.2)])
def test_packed_sequences_do_not_see_each_other(index_dtype, dropout_p, dtype):
    # Lengths 100, 0, 33, 67: a ragged tile, an empty sequence, a tile shared by two.
    cu_seqlens = torch.tensor([0, 100, 100, 133, 200], dtype=index_dtype)

    def attend(backend):
        def attend(*x):
            torch.manual_seed(3)
            return ops.attention(*x, causal=True, cu_seqlens=cu_seqlens, dropout_p=dropout_p, backend=backend)

        return attend

    inputs = [torch.randn(200, 2, 64).to(dtype) for _ in range(3)]
    assert_same_math(attend("cuda"), attend("torch"), inputs, NAMES)


# Lengths 100, 0, 33, 67; of them 66 (two blocks of queries, the second ragged), none, the first, and three far apart,
# one of them twice.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("causal", "dropout_p", "index_dtype"), [(True, 0.2, torch.int64), (False, 0.0, torch.int32)])
def test_chosen_queries_are_the_rows_that_they_are_among_all(causal, dropout_p, index_dtype, dtype):
    cu_seqlens = torch.tensor([0, 100, 100, 133, 200], dtype=index_dtype)
    positions = torch.tensor([*range(9), *range(10, 58, 3), *range(59, 100), 0, 7, 40, 40, 66], dtype=index_dtype)
    count = positions.numel() - 5
    cu_seqlens_q = torch.tensor([0, count, count, count + 1, count + 5])
    places = positions + cu_seqlens[:-1].repeat_interleave(cu_seqlens_q.diff())
    chosen = {"cu_seqlens": cu_seqlens, "cu_seqlens_q": cu_seqlens_q, "positions_q": positions}

    def among_all(backend):
        def attend(query, key, value):
            torch.manual_seed(3)
            options = {"causal": causal, "dropout_p": dropout_p, "backend": backend}
            return ops.attention(query, key, value, cu_seqlens=cu_seqlens, **options).index_select(0, places)

        return attend

    def of_chosen(query, key, value):
        torch.manual_seed(3)
        options = {"causal": causal, "dropout_p": dropout_p, "backend": "cuda"}
        return ops.attention(query.index_select(0, places), key, value, **chosen, **options)

    inputs = [torch.randn(200, 2, 64).to(dtype) for _ in range(3)]
    assert torch.equal(of_chosen(*inputs), among_all("cuda")(*inputs))
    assert_same_math(of_chosen, among_all("torch"), inputs, NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packed_qkv_has_one_gradient_and_reads_strides(dtype):
    qkv = torch.randn(2, 70, 3, 2, 64).to(dtype)

    def attend(backend):
        return lambda qkv: ops.attention_packed_qkv(qkv, causal=True, backend=backend)

    assert_same_math(attend("cuda"), attend("torch"), [qkv], ["qkv"])


def test_addresses_that_vectors_cannot_read():
    query, key, value = (x.bfloat16()[..., 1:] for x in tensors(1, 40, 2, 65))
    assert query.data_ptr() % 16
    exact = stock(False)(*(x.double() for x in (query, key, value)))
    assert_parity(fused()(query, key, value), stock(False)(query, key, value), exact)


def test_a_gradient_that_is_needed_alone():
    query, key, value = tensors(1, 70, 1, 16)
    out = fused()(query.requires_grad_(), key, value)
    (dq,) = torch.autograd.grad(out.sum(), query)
    assert_parity(dq, dq, torch.autograd.grad(stock(False)(query, key, value).sum(), query)[0].double())


def test_empty_inputs():
    for shape, keys in (((0, 5, 1, 16), 5), ((1, 0, 1, 16), 4), ((1, 3, 1, 16), 0)):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = [x.requires_grad_() for x in tensors(*shape, keys=keys, dtype=dtype)]
            out = fused()(*inputs)
            assert out.shape == shape
            assert (out == 0).all()
            assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), inputs))
