"""The Triton attention: the weights that C++ drops, gradients that nobody needs, the same bits every time."""

import pytest
import torch
from interpreter.memory import traffic

from fasttune import ops
from fasttune.ops._attention_call import Call
from fasttune.ops.attention import _attention

SEED = torch.tensor([-(2**61) + 9])


# Equal scores and a one-hot value for each key: the output shows which weights were kept.
@pytest.mark.skipif("cpp" not in ops.available_backends("attention"), reason="no compiled library")
@pytest.mark.parametrize("chosen", [False, True])
def test_dropped_weights_are_those_of_cpp(chosen):
    keys, positions = 160, torch.tensor([0, 3, 70, 127, 128, 159], dtype=torch.int32)
    offsets, starts = (torch.tensor([0, rows], dtype=torch.int32) for rows in (keys, positions.numel()))
    for first in range(0, keys, 128):
        value = torch.zeros(keys, 2, 128)
        part = torch.eye(keys)[:, first : first + 128]
        value[:, :, : part.shape[1]] = part.unsqueeze(1)
        query = torch.zeros(positions.numel() if chosen else keys, 2, 128)
        of_some = {"cu_seqlens_q": starts, "positions_q": positions} if chosen else {}
        call = Call(offsets, seed=SEED, causal=True, dropout_p=0.3, **of_some)
        tensors = (query, torch.zeros_like(value), value)
        masks = [_attention._run(*tensors, *call, backend)[0] != 0 for backend in ("cpp", "triton")]
        assert torch.equal(*masks)


def test_gradients_that_nobody_needs_are_not_computed():
    query, key, value = (torch.randn(1, 70, 1, 16) for _ in range(3))
    with traffic() as moved:
        torch.autograd.grad(ops.attention(query.requires_grad_(), key, value, backend="triton").sum(), query)
    assert ("attention_dq_kernel", "load") in moved
    assert ("attention_dkdv_kernel", "load") not in moved


@pytest.mark.parametrize("packed", [False, True])
def test_two_runs_give_the_same_bits(packed):
    shape, offsets = ((140, 1, 32), torch.tensor([0, 30, 140])) if packed else ((1, 140, 1, 32), None)
    leaves = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(shape)

    def gradients():
        torch.manual_seed(1)
        out = ops.attention(*leaves, causal=True, dropout_p=0.1, cu_seqlens=offsets, backend="triton")
        return torch.autograd.grad(out, leaves, upstream)

    assert all(map(torch.equal, gradients(), gradients()))
