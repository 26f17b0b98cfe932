"""Second derivatives: right, or one sentence; never the sum without half of its terms."""

import pytest
import torch
from every_operator import CALLS
from fused import FUSED
from sentences import assert_sentence
from torch.utils._python_dispatch import TorchDispatchMode

# Second derivatives that come out right: the backward of these is made of differentiable operators.
RIGHT = {"dropout", "rotary", "rotary, sequences", "pack and unpack"}
PAIRS = [(name, i, j) for name, call in CALLS.items() for i in range(len(call.shapes)) for j in range(len(call.shapes))]


class Watching(TorchDispatchMode):
    """Sends every call through the dispatcher, as torch.compile and tensor subclasses do."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def gradients(name, backend, function=lambda out: out.square().sum(), dtype=torch.float32):
    call = CALLS[name]
    leaves = [x.requires_grad_() for x in call.tensors(dtype)]
    out = function(call.function(*leaves, backend=backend))
    first = torch.autograd.grad(out, leaves, create_graph=True)
    return leaves, [x.to_dense() if x.is_sparse else x for x in first]


def differentiate(name, i, j, backend, dtype=torch.float32):
    leaves, first = gradients(name, backend, dtype=dtype)
    return torch.autograd.grad(first[i].square().sum(), leaves[j], allow_unused=True)[0]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("name", "i", "j"), PAIRS)
def test_each_gradient_by_each_input(monkeypatch, name, i, j, traced):
    """Also by one input alone, for which autograd prunes whatever does not lead to it."""
    if name in RIGHT and not traced:
        monkeypatch.setenv("FASTTUNE_BACKEND", "auto")  # packing takes it, in float64 too
        truth = differentiate(name, i, j, "torch", torch.float64)
        torch.testing.assert_close(differentiate(name, i, j, FUSED).double(), truth, rtol=1e-5, atol=1e-5)
        return

    def twice():
        if not traced:
            return differentiate(name, i, j, FUSED)
        with Watching():
            return differentiate(name, i, j, FUSED)

    if name in RIGHT:
        torch.testing.assert_close(twice(), differentiate(name, i, j, FUSED))
    else:
        assert_sentence(twice, "has no second derivative")


@pytest.mark.parametrize("name", CALLS)
def test_a_constant_upstream_hides_nothing(name):
    """The sum's gradient is a constant: only the arguments lead from the first derivative to the second."""
    leaves, first = gradients(name, FUSED, torch.sum)
    if CALLS[name].linear:
        assert not any(gradient.requires_grad for gradient in first)
    elif name in RIGHT:
        torch.autograd.grad(sum(gradient.sum() for gradient in first), leaves)
    else:
        total = sum(gradient.square().sum() for gradient in first)
        assert_sentence(lambda: torch.autograd.grad(total, leaves), "has no second derivative")


@pytest.mark.parametrize("name", CALLS)
def test_the_first_derivatives_of_a_graph_are_values(name):
    _, with_graph = gradients(name, FUSED)
    call = CALLS[name]
    leaves = [x.requires_grad_() for x in call.tensors()]
    plain = torch.autograd.grad(call.function(*leaves, backend=FUSED).square().sum(), leaves)
    for ours, theirs in zip(with_graph, plain, strict=True):
        assert torch.equal(ours, theirs.to_dense() if theirs.is_sparse else theirs)


@pytest.mark.parametrize("name", CALLS)
def test_a_batch_of_upstream_gradients(name):
    call = CALLS[name]
    leaves = [x.requires_grad_() for x in call.tensors()]
    out = call.function(*leaves, backend=FUSED)
    batch = torch.stack([torch.ones_like(out), torch.zeros_like(out)])
    assert_sentence(lambda: torch.autograd.grad(out, leaves, batch, is_grads_batched=True), "is_grads_batched=True")
