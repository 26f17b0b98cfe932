"""nn.BiasGELU, nn.LayerNormGELU and nn.LayerNormMLP against compositions of torch.nn modules."""

import pytest
import torch
from nn_checks import assert_module_parity, assert_same_keys
from oracle import DTYPES
from torch import nn

from fasttune import nn as fnn


class StockMLP(nn.Module):
    def __init__(self, embed_dim, hidden_dim, approximate, bias):
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim, bias=bias)
        self.linear1 = nn.Linear(embed_dim, hidden_dim, bias=bias)
        self.linear2 = nn.Linear(hidden_dim, embed_dim, bias=bias)
        self.gelu = nn.GELU(approximate)

    def forward(self, x):
        return self.linear2(self.gelu(self.linear1(self.norm(x))))


class StockBiasGELU(nn.Module):
    def __init__(self, features, approximate):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(features))
        self.gelu = nn.GELU(approximate)

    def forward(self, x):
        return self.gelu(x + self.bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_bias_gelu(dtype, approximate):
    ours, stock = fnn.BiasGELU(37, approximate), StockBiasGELU(37, approximate)
    assert_same_keys(ours, stock)
    assert_module_parity(ours, stock, [torch.randn(4, 3, 37)], dtype)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
def test_layer_norm_gelu(approximate, options):
    ours, stock = fnn.LayerNormGELU(37, approximate=approximate, **options), nn.LayerNorm(37, **options)
    assert_same_keys(ours, stock)
    assert_module_parity(
        ours,
        stock,
        [torch.randn(4, 3, 37)],
        stock_forward=lambda module, x: nn.functional.gelu(module(x), approximate=approximate),
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_layer_norm_mlp(approximate, bias):
    ours = fnn.LayerNormMLP(24, 96, approximate=approximate, bias=bias)
    stock = StockMLP(24, 96, approximate, bias)
    assert_same_keys(ours, stock)
    assert_module_parity(ours, stock, [torch.randn(2, 5, 24)])


def test_mlp_drops_in_training_alone():
    mlp, x = fnn.LayerNormMLP(64, 64, dropout=0.5), torch.randn(8, 64)
    assert (mlp.train()(x) == 0).float().mean() > 0.3
    assert torch.equal(mlp.eval()(x), mlp(x))


def test_bad_arguments_are_named():
    for build in (
        lambda: fnn.BiasGELU(4, "fast"),
        lambda: fnn.LayerNormGELU(4, approximate="fast"),
        lambda: fnn.LayerNormMLP(4, 4, approximate="fast"),
    ):
        with pytest.raises(ValueError, match="approximate is 'fast'; expected 'none' or 'tanh'"):
            build()
    with pytest.raises(ValueError, match="bias"):
        fnn.BiasGELU(4)(torch.randn(2, 5))
