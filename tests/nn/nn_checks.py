"""Checks shared by the module tests."""

import copy

import torch
from oracle import assert_parity


def assert_same_keys(ours, stock):
    """State dicts fit both ways, with the same names, shapes and dtypes."""
    ours.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in stock.named_parameters()]


def assert_module_parity(ours, stock, inputs, dtype=torch.float32, stock_forward=None):
    """Output, input gradients and parameter gradients of `ours` against `stock` in `dtype` and in float64.

    Parameters are first set to random values, the same in both.
    """
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    stock.load_state_dict(ours.state_dict())
    plain = lambda module, *args: module(*args)  # noqa: E731
    stock_forward = stock_forward or plain
    upstream = None
    results = []
    for module, forward, kind in (
        (stock, stock_forward, torch.float64),
        (ours, plain, dtype),
        (stock, stock_forward, dtype),
    ):
        module = copy.deepcopy(module).to(dtype).to(kind)
        leaves = [x.to(dtype).to(kind, copy=True).requires_grad_() if x.is_floating_point() else x for x in inputs]
        out = forward(module, *leaves)
        if upstream is None:
            upstream = torch.randn_like(out).to(dtype)
        wanted = [*(x for x in leaves if x.is_floating_point()), *module.parameters()]
        results.append([out.detach(), *torch.autograd.grad(out, wanted, upstream.to(kind))])
    floats = [f"grad input {i}" for i, x in enumerate(inputs) if x.is_floating_point()]
    names = ["output", *floats, *(f"grad {name}" for name, _ in ours.named_parameters())]
    for name, exact, actual, reference in zip(names, *results, strict=True):
        assert_parity(actual, reference, exact, name)
