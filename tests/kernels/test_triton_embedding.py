"""The Triton embedding sum: runs and pieces of its deterministic gradient, ids out of range, and the bytes it moves."""

import pytest
import torch
import torch.nn.functional as F
from interpreter.memory import traffic
from oracle import DTYPES, assert_same_math

from fasttune import ops
from fasttune.kernels import embedding as kernel

NAMES = ("word", "token_type", "position")


def problem(dtype=torch.float32, shape=(4, 45), columns=200):
    """Ids and tables. 180 rows are six pieces of the sorted order: token types form runs over several pieces, positions
    runs of four, words runs of every length, and one id occurs in a third of the rows."""
    words = torch.randint(0, 60, shape)
    words[torch.rand(shape) < 0.3] = 7
    types = (torch.arange(shape[1]) > 20).long().expand(shape)
    positions = torch.arange(shape[1]).expand(shape)
    tables = [torch.randn(size, columns).to(dtype) for size in (60, 2, 50)]
    return (words, types, positions), tables


def pair(ids, **options):
    def fused(word, token_type, position):
        return ops.embedding(
            *(ids[0], word),
            token_type_ids=ids[1],
            token_type_weight=token_type,
            position_ids=ids[2],
            position_weight=position,
            backend="triton",
            **options,
        )

    def stock(word, token_type, position):
        out = F.embedding(ids[0], word, options.get("padding_idx"))
        return out + F.embedding(ids[1], token_type) + F.embedding(ids[2], position)

    return fused, stock


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_torch(dtype):
    ids, tables = problem(dtype)
    assert_same_math(*pair(ids), tables, NAMES)


# 1500: two column programs, the second ragged; padding 7 is the id with the longest run.
def test_wide_rows_and_padding():
    ids, tables = problem(columns=1500)
    assert_same_math(*pair(ids, padding_idx=7), tables, NAMES)


# Runs that end and begin at a piece's edge, that span one, two and all pieces, and single rows in between.
@pytest.mark.parametrize("lengths", [(32, 32, 1, 31), (31, 33), (1, 95, 1), (96,), (33, 30, 2, 64), (1,), (5,)])
def test_runs_and_pieces(lengths):
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ids = ids[torch.randperm(ids.numel())]
    dout = torch.randn(ids.numel(), 40)
    ours = kernel.embedding_gradient(dout, ids, len(lengths) + 1, None)
    exact = torch.zeros(len(lengths) + 1, 40, dtype=torch.float64).index_add_(0, ids, dout.double())
    bound = max(lengths) * torch.finfo(torch.float32).eps * dout.abs().sum(0).max()
    assert (ours.double() - exact).abs().max() <= bound
    assert (ours[-1] == 0).all()


def test_an_id_out_of_range_reads_nothing():
    table = torch.randn(5, 16, requires_grad=True)
    out = ops.embedding(torch.tensor([1, 5, -1]), table, backend="triton")
    assert out.isnan().all(1).tolist() == [False, True, True]
    (gradient,) = torch.autograd.grad(out, table, torch.ones_like(out))
    assert gradient.sum(1).tolist() == [0.0, 16.0, 0.0, 0.0, 0.0]


def test_bytes_moved_are_the_minimum(moves_at_most):
    ids, tables = problem(torch.bfloat16, shape=(8, 48), columns=768)
    row = 768 * 2
    with traffic() as moved:
        pair(ids)[0](*tables)
    moves_at_most("embedding forward", moved, 4 * row * 8 * 48)
    dout = torch.randn(8, 48, 768).bfloat16()
    with traffic() as moved:  # positions: 48 runs of 8
        gradient = kernel.embedding_gradient(dout, ids[2], 48, None)
    moves_at_most("embedding backward", moved, dout.nbytes + gradient.nbytes, times=1.1)
