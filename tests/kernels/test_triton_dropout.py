"""The Triton dropout: the masks of docs/dropout.md bit for bit, those of C++, and the bytes it moves."""

import pytest
import torch
from interpreter.memory import traffic

from fasttune import ops
from fasttune.ops._reference.philox import elementwise_keep_mask, keep_scale
from fasttune.ops.dropout import _dropout


# 1: a single column; 131: one block and a ragged tail; 1500: two column programs; p = 1: nothing is kept.
@pytest.mark.parametrize(("rows", "columns", "p"), [(3, 1, 0.3), (33, 131, 0.1), (5, 1500, 0.5), (2, 128, 1.0)])
def test_mask_is_the_references_bit_for_bit(rows, columns, p):
    seed, ids = torch.tensor([-(2**62) + 12345]), torch.arange(rows) + 2**33 - 1
    out = _dropout(torch.ones(rows, columns), None, ids, seed, p, "triton")
    assert torch.equal(out, elementwise_keep_mask(ids, columns, seed, p) * torch.tensor(keep_scale(p)))


@pytest.mark.skipif("cpp" not in ops.available_backends("dropout"), reason="no compiled library")
def test_mask_is_the_cpp_one():
    x, seed = torch.randn(70, 384), torch.tensor([7])
    assert torch.equal(*(_dropout(x, x, None, seed, 0.1, backend) for backend in ("cpp", "triton")))


def test_bytes_moved_are_the_minimum(moves_at_most):
    x = torch.randn(64, 768).bfloat16()
    with traffic() as moved:
        _dropout(x, x, None, torch.tensor([1]), 0.1, "triton")
    moves_at_most("dropout", moved, 3 * x.nbytes)
