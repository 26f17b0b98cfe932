"""The Triton gather and scatter: exact copies both ways, in every dtype, and the bytes they move."""

import pytest
import torch
from interpreter.memory import traffic
from oracle import DTYPES

from fasttune import ops
from fasttune.ops.packing import _gather_rows, _scatter_rows


# 3 x 40: one tile; 1500: two column programs; no trailing dimension: columns of one element.
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64])
@pytest.mark.parametrize("trailing", [(3, 40), (1500,), ()])
def test_gather_and_scatter_are_copies(trailing, dtype):
    rows = (torch.randn(50, *trailing) * 100).to(dtype)
    indices = torch.randperm(50)[:33]
    packed = _gather_rows(rows, indices, 50, "triton")
    assert torch.equal(packed, rows[indices])
    back = _scatter_rows(packed, indices, 50, "triton")
    assert torch.equal(back, torch.zeros_like(rows).index_copy(0, indices, packed))


def test_pack_and_unpack_with_gradients(monkeypatch):
    monkeypatch.setenv("FASTTUNE_BACKEND", "triton")
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1]])
    x = torch.randn(3, 3, 20, requires_grad=True)
    with traffic() as moved:
        packed, batch = ops.pack(x, mask)
        (dx,) = torch.autograd.grad(ops.unpack(packed * 2, batch), x, torch.ones_like(x))
    assert ("gather_rows_kernel", "store") in moved
    assert torch.equal(packed, x[mask.bool()])
    assert torch.equal(dx, 2.0 * mask[..., None].expand_as(x))


def test_empty_batches():
    none = torch.empty(0, dtype=torch.int64)
    assert _gather_rows(torch.randn(4, 5), none, 4, "triton").shape == (0, 5)
    assert torch.equal(_scatter_rows(torch.randn(0, 5), none, 4, "triton"), torch.zeros(4, 5))


def test_an_index_out_of_range_reads_and_writes_nothing():
    rows = torch.randn(4, 5)
    out = _gather_rows(rows, torch.tensor([1, 4, -1, 2**40]), 4, "triton")
    assert torch.equal(out, torch.cat((rows[1:2], torch.zeros(3, 5))))
    back = _scatter_rows(rows, torch.tensor([1, 4, -1, 2**40]), 4, "triton")
    assert torch.equal(back, torch.cat((torch.zeros(1, 5), rows[:1], torch.zeros(2, 5))))


def test_bytes_moved_are_the_minimum(moves_at_most):
    rows, indices = torch.randn(256, 768).bfloat16(), torch.arange(0, 256, 2)
    with traffic() as gather:
        packed = _gather_rows(rows, indices, 256, "triton")
    with traffic() as scatter:
        _scatter_rows(packed, indices, 256, "triton")
    moves_at_most("pack", gather, 2 * packed.nbytes)
    moves_at_most("unpack", scatter, packed.nbytes + rows.nbytes)
