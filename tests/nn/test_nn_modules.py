"""What every module of fasttune.nn does alike: copying, pickling, printing, compiling, float64, autocast."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fasttune import nn as fnn

# module, arguments of a call, what its repr says
MODULES = {
    "CausalSelfAttention": (
        lambda: fnn.CausalSelfAttention(32, 2, dropout=0.1),
        lambda: (torch.randn(2, 5, 32),),
        "num_heads=2, dropout=0.1, resid_dropout=0.0",
    ),
    "SelfAttention": (
        lambda: fnn.SelfAttention(32, 2, batch_first=True),
        lambda: (torch.randn(2, 5, 32),),
        "out_proj",
    ),
    "LayerNorm": (lambda: fnn.LayerNorm(32), lambda: (torch.randn(3, 32),), "(32,), eps=1e-05"),
    "DropoutAddLayerNorm": (
        lambda: fnn.DropoutAddLayerNorm(32, dropout=0.1),
        lambda: (torch.randn(3, 32), torch.randn(3, 32)),
        "bias=True, dropout=0.1, prenorm=False",
    ),
    "BiasGELU": (lambda: fnn.BiasGELU(32), lambda: (torch.randn(3, 32),), "32, approximate='none'"),
    "LayerNormGELU": (lambda: fnn.LayerNormGELU(32), lambda: (torch.randn(3, 32),), "approximate='none'"),
    "LayerNormMLP": (lambda: fnn.LayerNormMLP(32, 64), lambda: (torch.randn(3, 32),), "approximate='tanh'"),
    "CrossEntropyLoss": (
        lambda: fnn.CrossEntropyLoss(),
        lambda: (torch.randn(3, 32), torch.tensor([1, -100, 31])),
        "CrossEntropyLoss()",
    ),
    "LinearCrossEntropyLoss": (
        lambda: fnn.LinearCrossEntropyLoss(32, 50),
        lambda: (torch.randn(3, 32), torch.tensor([1, -100, 49])),
        "in_features=32, num_classes=50",
    ),
}


def first(result):
    return result[0] if isinstance(result, tuple) else result


def run(module, inputs, function=None):
    """Output and gradients with a fixed seed."""
    torch.manual_seed(0)
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    out = first((module if function is None else function)(*leaves))
    wanted = [*(x for x in leaves if x.is_floating_point()), *module.parameters()]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), wanted)]


def test_every_module_is_here():
    assert set(MODULES) == set(fnn.__all__)


@pytest.fixture(params=MODULES, ids=str)
def module_and_inputs(request):
    build, inputs, _ = MODULES[request.param]
    return build(), inputs()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_compute_the_same_and_share_nothing(module_and_inputs, copied):
    module, inputs = module_and_inputs
    twin = copied(module)
    assert type(twin) is type(module)
    for ours, theirs in zip(run(module, inputs), run(twin, inputs), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        assert ours.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize("name", MODULES)
def test_repr_says_what_it_is(name):
    build, _, expected = MODULES[name]
    assert name in repr(build())
    assert expected in repr(build())


def test_compiles_as_one_graph(module_and_inputs):
    module, inputs = module_and_inputs
    compiled = torch.compile(module.eval(), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(run(module, inputs, compiled), run(module, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_float64_runs_on_torch(module_and_inputs):
    module, inputs = module_and_inputs
    module.eval().double()
    doubled = [x.double() if x.is_floating_point() else x for x in inputs]
    for name, result in zip(("output", *("gradient",) * 99), run(module, doubled)):  # noqa: B905
        assert result.dtype == torch.float64, name
        assert torch.isfinite(result).all(), name


def test_autocast_gives_float32_gradients(module_and_inputs):
    module, inputs = module_and_inputs
    if isinstance(module, nn.CrossEntropyLoss | fnn.LinearCrossEntropyLoss):
        inputs = [inputs[0].bfloat16(), inputs[1]]
    with torch.autocast("cpu", torch.bfloat16):
        results = run(module, inputs)
    for result, parameter in zip(results[len(results) - len(list(module.parameters())) :], module.parameters()):  # noqa: B905
        assert result.dtype == parameter.dtype
        assert torch.isfinite(result).all()


def test_kernels_run_where_the_library_is_built(module_and_inputs, monkeypatch):
    """FASTTUNE_BACKEND reaches the modules: both backends agree."""
    from fasttune import ops

    if "cpp" not in ops.available_backends("dropout"):
        pytest.skip("no compiled library")
    module, inputs = module_and_inputs
    module.eval()
    monkeypatch.setenv("FASTTUNE_BACKEND", "cpp")
    compiled = run(module, inputs)
    monkeypatch.setenv("FASTTUNE_BACKEND", "torch")
    for ours, reference in zip(compiled, run(module, inputs), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
