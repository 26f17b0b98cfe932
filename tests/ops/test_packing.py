"""ops.pack and ops.unpack: exact copies both ways, whatever the mask, with exact gradients."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from fused import INTERPRETED
from hypothesis import given, settings

from fasttune import ops
from fasttune.ops.packing import PackedBatch, _copier

COPIER = "triton" if INTERPRETED else "torch"  # the C++ library has no kernel for plain copies
MASKS = {
    "right padded": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "left padded": [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]],
    "an empty sequence": [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]],
    "no padding": [[1, 1, 1, 1]] * 3,
    "nothing real": [[0, 0, 0, 0]] * 3,
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_pack_takes_the_real_rows_and_unpack_puts_them_back(name, dtype):
    mask = torch.tensor(MASKS[name]).to(dtype)
    x = torch.randn(3, 4, 2, 5, requires_grad=True)
    packed, batch = ops.pack(x, mask)
    assert torch.equal(packed, x[mask != 0])
    assert batch.cu_seqlens.diff().tolist() == (mask != 0).sum(1).tolist()
    assert batch.max_seqlen == (mask != 0).sum(1).max()
    assert batch.is_full == bool((mask != 0).all())
    back = ops.unpack(packed, batch)
    assert torch.equal(back, torch.where((mask != 0)[..., None, None], x, 0.0))
    upstream = torch.randn_like(back)
    (grad,) = torch.autograd.grad(back, x, upstream)
    assert torch.equal(grad, torch.where((mask != 0)[..., None, None], upstream, 0.0))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_packed_rows_invert_indices(data):
    batch_size, length = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 6))
    bits = data.draw(st.lists(st.booleans(), min_size=batch_size * length, max_size=batch_size * length))
    batch = PackedBatch.from_mask(torch.tensor(bits, dtype=torch.bool).view(batch_size, length))
    assert batch.total == sum(bits)
    assert batch.packed_rows[batch.indices].tolist() == list(range(batch.total))
    assert (batch.packed_rows == -1).sum() == len(bits) - batch.total


@pytest.mark.parametrize(
    ("positions", "boundaries"),
    [
        ([[0, 1, 2, 0, 1, 0]], [0, 3, 5, 6]),
        ([[0, 1, 2, 3]], [0, 4]),
        ([[0, 0, 0]], [0, 1, 2, 3]),
        ([[0, 1, 0], [0, 1, 2]], [0, 2, 3, 6]),  # a row always starts a sequence
        ([[5, 6, 7]], [0, 3]),  # a single sequence that does not start at 0
    ],
)
def test_position_ids_that_restart_cut_sequences(positions, boundaries):
    batch = PackedBatch.from_position_ids(torch.tensor(positions))
    assert batch.cu_seqlens.tolist() == boundaries
    assert batch.max_seqlen == max(b - a for a, b in itertools.pairwise(boundaries))
    assert batch.is_full


def test_operators_pass_opcheck_and_gradcheck():
    x = torch.randn(6, 3, dtype=torch.float32 if INTERPRETED else torch.float64, requires_grad=True)
    indices = torch.tensor([0, 2, 5])
    torch.library.opcheck(torch.ops.fasttune.gather_rows.default, (x, indices, 6, COPIER))
    torch.library.opcheck(torch.ops.fasttune.scatter_rows.default, (x[:3].detach(), indices, 6, COPIER))
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    if not INTERPRETED:
        assert torch.autograd.gradcheck(lambda x: ops.unpack(*ops.pack(x.view(2, 3, 3), mask)), x)


def test_who_copies_follows_the_environment(monkeypatch):
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 0, 1], [1, 1, 0]])
    for requested in (None, "auto", "cpp", "torch"):
        if requested is None:
            monkeypatch.delenv("FASTTUNE_BACKEND", raising=False)
        else:
            monkeypatch.setenv("FASTTUNE_BACKEND", requested)
        assert _copier(x) == "torch"  # the C++ library has no copies; on a CPU nobody chooses Triton by himself
    monkeypatch.setenv("FASTTUNE_BACKEND", "triton")
    if INTERPRETED:
        assert _copier(x) == "triton"
    else:
        with pytest.raises(RuntimeError, match="'triton' was asked for packing, but"):
            ops.pack(x, mask)


def test_bad_input_is_named():
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r"x is float32 of shape \(2, 3, 4\) on cpu; expected shape \(2, 2\)"):
        ops.pack(x, torch.ones(2, 2))
    with pytest.raises(ValueError, match="expected a 0/1 mask of shape"):
        ops.pack(x, torch.ones(2, 1, 2, 2))
    batch = PackedBatch.from_mask(torch.tensor([[1, 1], [1, 0]]))
    with pytest.raises(ValueError, match="packed is float32 of shape .*one row per real token"):
        ops.unpack(torch.randn(4, 2), batch)
