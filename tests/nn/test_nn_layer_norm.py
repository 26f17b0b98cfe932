"""nn.LayerNorm and nn.DropoutAddLayerNorm against torch.nn.LayerNorm."""

import pytest
import torch
from nn_checks import assert_module_parity, assert_same_keys
from oracle import DTYPES

from fasttune import nn as fnn

OPTIONS = [
    {},
    {"eps": 1e-12},
    {"bias": False},
    {"elementwise_affine": False},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [33, (4, 9)], ids=str)
def test_layer_norm_is_torchs(dtype, options, shape):
    ours, stock = fnn.LayerNorm(shape, **options), torch.nn.LayerNorm(shape, **options)
    assert_same_keys(ours, stock)
    assert_module_parity(ours, stock, [torch.randn(3, 5, *stock.normalized_shape)], dtype)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [33, (4, 9)], ids=str)
def test_dropout_add_layer_norm_is_the_sum_normalised(options, shape):
    ours, stock = fnn.DropoutAddLayerNorm(shape, **options), torch.nn.LayerNorm(shape, **options)
    assert_same_keys(ours, stock)
    inputs = [torch.randn(3, 5, *stock.normalized_shape) for _ in range(2)]
    assert_module_parity(ours, stock, inputs, stock_forward=lambda module, x, residual: module(x + residual))


def test_prenorm_also_returns_the_sum():
    module = fnn.DropoutAddLayerNorm(16, prenorm=True)
    x, residual = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    normalised, total = module(x, residual)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normalised, torch.nn.functional.layer_norm(x + residual, (16,)))


def test_dropout_acts_in_training_alone_and_follows_the_seed():
    module = fnn.DropoutAddLayerNorm(256, dropout=0.5, prenorm=True)
    x, residual = torch.ones(4, 256), torch.zeros(4, 256)
    assert torch.equal(module.eval()(x, residual)[1], x)
    torch.manual_seed(3)
    first = module.train()(x, residual)[1]
    torch.manual_seed(3)
    assert torch.equal(first, module(x, residual)[1])
    assert 0.3 < (first == 0).float().mean() < 0.7


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"LayerNorm: the input has shape \(2, 4\); expected it to end in .*\(5,\)"):
        fnn.LayerNorm(5)(torch.randn(2, 4))
    with pytest.raises(ValueError, match="dropout_p is 2"):
        fnn.DropoutAddLayerNorm(5, dropout=2)
    with pytest.raises(ValueError, match="residual"):
        fnn.DropoutAddLayerNorm(5)(torch.randn(2, 5), torch.randn(3, 5))
