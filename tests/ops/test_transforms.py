"""torch.func and forward-mode derivatives: `auto` takes the torch backend and is right, a fused one says a sentence."""

import pytest
import torch
from every_operator import CALLS
from fused import FUSED
from sentences import assert_sentence
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap


def tangents(call):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator) for shape in call.shapes)


def dual(function, call):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, tangent) for x, tangent in zip(call.tensors(), tangents(call), strict=True)]
        return forward_ad.unpack_dual(function(*duals)).tangent


def batch(call):
    return [torch.stack([x, 2 * x]) for x in call.tensors()]


def loss(function):
    return lambda *tensors: function(*tensors).square().sum()


def every(call):
    return tuple(range(len(call.shapes)))


def twice(function, call):
    def norm(*tensors):
        return sum(gradient.square().sum() for gradient in grad(loss(function), argnums=every(call))(*tensors))

    return grad(norm, argnums=every(call))(*call.tensors())


TRANSFORMS = {
    "jvp": lambda function, call: jvp(function, tuple(call.tensors()), tangents(call))[1],
    "dual numbers": dual,
    "grad": lambda function, call: grad(loss(function), argnums=every(call))(*call.tensors()),
    "grad of grad": twice,
    "vmap": lambda function, call: vmap(function, randomness="same")(*batch(call)),
    "vmap of grad": lambda function, call: vmap(grad(loss(function)), randomness="same")(*batch(call)),
    "jacrev": lambda function, call: jacrev(loss(function), argnums=every(call))(*call.tensors()),
}


@pytest.fixture
def nothing_asked_for(monkeypatch):
    monkeypatch.delenv("FASTTUNE_BACKEND", raising=False)


def tensors_of(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", CALLS)
def test_auto_is_right(nothing_asked_for, name, transform):
    call = CALLS[name]
    ours, reference = (
        TRANSFORMS[transform](lambda *x, backend=backend: call.function(*x, backend=backend), call)
        for backend in (None, "torch")
    )
    assert all(map(torch.equal, tensors_of(ours), tensors_of(reference)))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", [name for name in CALLS if name != "pack and unpack"])  # names no backend
def test_a_fused_backend_says_what_to_do(name, transform):
    call = CALLS[name]

    def fused(*tensors):
        return call.function(*tensors, backend=FUSED)

    assert_sentence(lambda: TRANSFORMS[transform](fused, call), "fasttune: ", "backend='torch'")


def test_a_dual_level_without_dual_numbers_changes_nothing():
    call = CALLS["layer_norm"]
    with forward_ad.dual_level():
        inside = call.function(*call.tensors(), backend=FUSED)
    assert torch.equal(inside, call.function(*call.tensors(), backend=FUSED))


def test_a_tangent_of_the_upstream_gradient_is_not_lost():
    call = CALLS["layer_norm"]
    leaves = [x.requires_grad_() for x in call.tensors()]
    out = call.function(*leaves, backend=FUSED)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        assert_sentence(lambda: torch.autograd.grad(out, leaves, upstream), "forward-mode")


def test_the_references_match_plain_torch_under_a_transform():
    x, weight, bias = CALLS["layer_norm"].tensors()
    stock = jacrev(lambda x: torch.nn.functional.layer_norm(x, (20,), weight, bias))(x[0])
    assert torch.equal(jacrev(lambda x: CALLS["layer_norm"].function(x, weight, bias, backend="torch"))(x[0]), stock)
