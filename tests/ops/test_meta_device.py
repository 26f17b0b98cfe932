"""Shapes and dtypes on the meta device, forward and backward, without a backend that was asked for."""

import pytest
import torch
from every_operator import CALLS
from sentences import assert_sentence

from fasttune import ops


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch):
    monkeypatch.delenv("FASTTUNE_BACKEND", raising=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "pack and unpack"])
def test_shapes_are_those_of_the_cpu(name, dtype):
    call = CALLS[name]
    leaves = [x.to("meta").requires_grad_() for x in call.tensors(dtype)]
    out, real = call.function(*leaves), call.function(*call.tensors(dtype))
    assert out.is_meta
    assert (out.shape, out.dtype) == (real.shape, real.dtype)
    if name == "tied_views":  # torch makes no dense tensor of a sparse one there
        return
    gradients = torch.autograd.grad(out.float().sum(), leaves)
    assert [gradient.shape for gradient in gradients] == [x.shape for x in leaves]


def test_what_needs_values_says_so():
    assert_sentence(lambda: ops.pack(torch.randn(2, 3, 8, device="meta"), torch.ones(2, 3, device="meta")), "meta")


def test_a_backend_that_was_asked_for_says_so():
    x = torch.randn(4, 8, device="meta")
    for backend in ("cpp", "triton"):
        with pytest.raises(RuntimeError, match=f"'{backend}' was asked for layer_norm, but"):
            ops.layer_norm(x, None, None, backend=backend)
