"""torch.jit.trace, and the exporter to ONNX on top of it, would record addresses: a sentence, or a right trace."""

import pytest
import torch
from every_operator import CALLS
from fused import FUSED
from sentences import assert_sentence

from fasttune import ops
from fasttune.ops import _transforms

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
UNREADABLE = {"pack and unpack"}  # counts real tokens in Python


def trace(name, backend):
    call = CALLS[name]
    return torch.jit.trace(lambda *x: call.function(*x, backend=backend), call.tensors(), check_trace=False)


@pytest.mark.parametrize("backend", [None, FUSED])
@pytest.mark.parametrize("name", CALLS)
def test_a_fused_operator_is_not_recorded(monkeypatch, name, backend):
    monkeypatch.delenv("FASTTUNE_BACKEND", raising=False)
    assert_sentence(lambda: trace(name, backend), "fasttune: ", "unpatch(model)")


@pytest.mark.parametrize("name", [name for name in CALLS if name not in UNREADABLE])
def test_the_torch_backend_is_recorded(name):
    call = CALLS[name]
    others = [1.5 * x + 0.25 for x in call.tensors()]
    assert torch.equal(trace(name, "torch")(*others), call.function(*others, backend="torch"))


def test_packed_lengths_are_no_constants_of_a_trace():
    query = torch.randn(9, 2, 16)

    def attend(query, offsets):
        return ops.attention(query, query, query, cu_seqlens=offsets, backend="torch")

    traced = torch.jit.trace(attend, (query, torch.tensor([0, 2, 4, 9])), check_trace=False)
    others = torch.tensor([0, 8, 9, 9])
    torch.testing.assert_close(traced(query, others), attend(query, others))


def test_nothing_is_left_behind():
    with pytest.raises(RuntimeError):
        trace("layer_norm", FUSED)
    assert not _transforms.tracing()
    x = torch.randn(4, 20)
    assert ops.layer_norm(x, None, None, backend=FUSED).shape == x.shape
