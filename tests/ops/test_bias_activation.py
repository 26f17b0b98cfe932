"""ops.bias_activation against torch's composition, for what test_gelu.py does not hold of its two GELUs already."""

import pytest
import torch
from extremes import assert_no_worse, combinations
from fused import FUSED, either, reference_only
from oracle import DTYPES, assert_parity, assert_same_math, run

from fasttune import ops
from fasttune.ops._activations import ACTIVATIONS
from fasttune.ops._reference.activation import bias_activation as reference

# 7: less than a vector; 16: one; 100, 1000: ragged ends.
COLUMNS = either((7, 16, 100, 1000), (7, 1000))
SEED = 1
# Beside GELU's own tests, which run the same kernels.
OTHERS = [name for name in ACTIVATIONS if not name.startswith("gelu")]


def ours(activation, backend=FUSED):
    return lambda x, bias=None: ops.bias_activation(x, bias, activation=activation, backend=backend)


def stock(activation):
    return lambda x, bias=None: reference(x, bias, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_match_the_reference(isa, dtype, activation):
    for columns in COLUMNS:
        for rows in (0, 3, 257) if columns == 100 else (3,):
            torch.manual_seed(SEED)
            x, bias = torch.randn(rows, columns).mul(3).to(dtype), torch.randn(columns).to(dtype)
            assert_same_math(ours(activation), stock(activation), [x, bias], ["x", "bias"])


@pytest.mark.parametrize("activation", OTHERS)
def test_every_binade_is_as_accurate_as_stock(isa, activation):
    """Output and slope, from the smallest normal numbers to overflow, on intervals of one binade each."""
    exponents = torch.tensor([*range(-126, -20, 15), *range(-20, 8), *range(8, 127, 15)])
    binades = torch.cat((2.0**exponents, -(2.0**exponents)))[:, None]
    x = binades * (1 + torch.rand(len(binades), 1000))
    dout = torch.ones_like(x)
    found = run(ours(activation), [x], dout), run(stock(activation), [x], dout)
    exact = run(stock(activation), [x.double()], dout.double())
    for what, *values in zip(("output", "slope"), *found, exact, strict=True):
        for binade, value, other, truth in zip(binades.flatten().tolist(), *values, strict=True):
            kept = truth.abs() <= torch.finfo(torch.float32).max  # a square may be beyond it
            assert (value[~kept] == torch.inf).all()
            assert_parity(value[kept], other[kept], truth[kept], what=f"{what} near {binade:g}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_numbers(isa, dtype, activation):
    x, dout = combinations(1, dtype)
    assert_no_worse(ours(activation), stock(activation), [x, dout])


def test_strided_rows_are_read_where_they_lie(isa, monkeypatch):
    whole = torch.randn(6, 5, 200)
    copies = []
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x, f=torch.Tensor.contiguous: copies.append(x) or f(x))
    out = ops.bias_activation(whole[..., 30:130], None, activation="silu", backend=FUSED)
    assert all(x.is_contiguous() for x in copies)
    monkeypatch.undo()
    torch.testing.assert_close(out, torch.nn.functional.silu(whole[..., 30:130]))
    for x in (whole[..., 30:130], whole.transpose(0, 2), whole[..., ::2], whole[:, 2:3].expand(6, 3, 200)):
        assert_same_math(ours("silu"), stock("silu"), [x], ["x"])


def test_gelu_is_bias_gelu_bit_for_bit(isa):
    x, bias, dout = torch.randn(9, 70), torch.randn(70), torch.randn(9, 70)
    for activation, approximate in (("gelu", "none"), ("gelu_tanh", "tanh")):
        gelu = run(lambda *a, o=approximate: ops.bias_gelu(*a, approximate=o, backend=FUSED), [x, bias], dout)
        assert all(map(torch.equal, run(ours(activation), [x, bias], dout), gelu))


@reference_only
@pytest.mark.parametrize("activation", OTHERS)
def test_gradcheck_of_the_reference(activation):
    torch.manual_seed(SEED)
    x, bias = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(ours(activation, "torch"), (x.requires_grad_(), bias.requires_grad_()))


@reference_only
@pytest.mark.parametrize(("activation", "name"), [("quick_gelu", "quick_gelu"), ("relu2", "relu2"), ("silu", "swish")])
def test_activations_are_those_of_transformers(activation, name):
    activations = pytest.importorskip("transformers.activations")
    x = torch.randn(64, 96) * 3
    assert torch.equal(
        ops.bias_activation(x, None, activation=activation, backend="torch"), activations.ACT2FN[name](x)
    )


def test_opcheck():
    x, bias = torch.randn(3, 70), torch.randn(70)
    for tensors in ((x, bias), (x.clone().requires_grad_(), bias.clone().requires_grad_()), (x, None)):
        torch.library.opcheck(torch.ops.fasttune.bias_activation.default, (*tensors, 3, FUSED))
    torch.library.opcheck(
        torch.ops.fasttune.bias_activation_backward.default, (torch.randn(3, 70), x, bias, 3, True, False, FUSED)
    )


def test_bad_input_is_named():
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="activation is 'tanh'; expected one of gelu, gelu_tanh, silu, relu, quick_ge"):
        ops.bias_activation(x, None, activation="tanh")
    with pytest.raises(ValueError, match=r"bias is float32 of shape \(4,\) on cpu; expected shape \(3,\)"):
        ops.bias_activation(x, torch.randn(4))
    with pytest.raises(TypeError, match="x is int64"):
        ops.bias_activation(torch.arange(3), None)
    with pytest.raises(RuntimeError, match=rf"'{FUSED}' was asked for bias_activation, but .*float64"):
        ops.bias_activation(x.double(), None, backend=FUSED)
