"""ops.bias_gelu against its torch reference: accuracy over the whole range of x, shapes, dtypes, instruction sets."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from fused import FUSED, cpp_only, either, needs_fused, reference_only
from hypothesis import given, settings
from oracle import DTYPES, SWEEP_SLACK, assert_parity, assert_same_math, run

from fasttune import ops
from fasttune.ops._reference.gelu import bias_gelu as reference

APPROXIMATE = ("none", "tanh")
# 1 and 7: less than a vector; 16: one; 100, 1000: ragged ends; 768, 1024, 3072: real models; 5000: long and ragged.
COLUMNS = either((1, 7, 16, 100, 768, 1000, 1024, 3072, 5000), (1, 7, 100, 1000, 5000))
# Fixed: where a tensor has one or three elements, stock's error is a sample of that size and may be 0 by luck.
SEED = 1


def _ours(approximate, backend=FUSED):
    return lambda x, bias=None: ops.bias_gelu(x, bias, approximate=approximate, backend=backend)


def _stock(approximate):
    return lambda x, bias=None: reference(x, bias, approximate)


def _exact(approximate):
    """The same functions written without the cancellation of 1 + erf and 1 + tanh, which shows even in float64."""
    if approximate == "tanh":
        return lambda x: x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    return lambda x: x * 0.5 * torch.special.erfc(-x / 2**0.5)


@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_match_the_reference(isa, dtype, approximate):
    for columns in COLUMNS:
        for rows in (0, 1, 3, 257) if columns <= 100 else (3,):
            torch.manual_seed(SEED)
            x, bias = torch.randn(rows, columns).mul(3).to(dtype), torch.randn(columns).to(dtype)
            assert_same_math(_ours(approximate), _stock(approximate), [x, bias], ["x", "bias"])


@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_bias_beside_16_bit_x(isa, dtype, approximate):
    torch.manual_seed(0)
    x, bias = torch.randn(33, 100).to(dtype), torch.randn(100)
    upside_down = [lambda x, bias: _stock(approximate)(x.flip(0), bias).flip(0)]  # a sum over rows in another order
    assert_same_math(_ours(approximate), _stock(approximate), [x, bias], ["x", "bias"], again=upside_down)


@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_every_binade_is_as_accurate_as_stock(isa, approximate):
    """Output and slope, from the smallest normal numbers to overflow, on intervals of one binade each."""
    for exponent in (*range(-126, -20, 15), *range(-20, 8), *range(8, 127, 15)):
        for sign in (1.0, -1.0):
            x = sign * (1 + torch.rand(1000)) * 2.0**exponent
            if approximate == "tanh" and exponent >= 42:
                continue  # stock's x³ and its derivative overflow; test_limits has these
            ours, stock = (
                run(_ours(approximate), [x], torch.ones(1000)),
                run(_stock(approximate), [x], torch.ones(1000)),
            )
            exact = run(_exact(approximate), [x.double()], torch.ones(1000, dtype=torch.float64))
            for what, *values in zip(("output", "slope"), ours, stock, exact, strict=True):
                assert_parity(*values, what=f"{what} near {sign * 2.0**exponent:g}")


@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_limits(isa, dtype, approximate):
    inf, largest = float("inf"), torch.finfo(dtype).max
    x = torch.tensor([largest, -largest, 0.0, -0.0, 1e-30], dtype=dtype)
    out, slope = run(_ours(approximate), [x], torch.ones(5))
    expected = torch.tensor([largest, 0.0, 0.0, 0.0, 0.5e-30], dtype=dtype)
    assert torch.equal(out, expected)
    assert torch.equal(slope, torch.tensor([1.0, 0.0, 0.5, 0.5, 0.5], dtype=dtype))
    # x Φ(x) with Φ(-inf) = 0, and a slope Φ(x) + x φ(x) with φ = 0 at both. Stock's erf makes NaN of +inf in float32.
    infinite = torch.tensor([inf, -inf] * 20, dtype=dtype)
    stock = run(_stock(approximate), [infinite], torch.ones(40))
    out, slope = run(_ours(approximate), [infinite], torch.ones(40))
    assert (out[::2] == inf).all()
    assert (stock[0][::2].isnan() | (stock[0][::2] == inf)).all()
    for ours, theirs in ((out[1::2], stock[0][1::2]), (slope, stock[1])):
        assert ours.isnan().all()
        assert theirs.isnan().all()
    nan = run(_ours(approximate), [torch.full((40,), float("nan"), dtype=dtype)], torch.ones(40))
    assert all(value.isnan().all() for value in nan)


def test_tanh_form_is_transformers_gelu_new():
    activations = pytest.importorskip("transformers.activations")
    gelu_new, x, bias = activations.NewGELUActivation(), torch.randn(64, 96) * 3, torch.randn(96)
    assert_same_math(_ours("tanh"), lambda x, bias: gelu_new(x + bias), [x, bias], ["x", "bias"])


@needs_fused
@settings(max_examples=either(40, 8), deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=2),
    columns=st.integers(20, 300),
    step=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES),
    approximate=st.sampled_from(APPROXIMATE),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_strides(shape, columns, step, dtype, approximate, with_bias, seed):
    torch.manual_seed(seed)
    x = torch.randn(columns * step, *shape).to(dtype).movedim(0, -1)[..., ::step]
    inputs = [x, torch.randn(columns * step).to(dtype)[::step]][: 1 + with_bias]
    assert_same_math(_ours(approximate), _stock(approximate), inputs, ["x", "bias"][: 1 + with_bias], slack=SWEEP_SLACK)


def test_gradients_that_nobody_needs_are_not_computed(isa):
    x, bias, dout = torch.randn(5, 70), torch.randn(70), torch.randn(5, 70)
    both = run(_ours("none"), [x, bias], dout)
    only_x = x.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(_ours("none")(only_x, bias), only_x, dout)[0], both[1])
    only_bias = bias.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(_ours("none")(x, only_bias), only_bias, dout)[0], both[2])


@cpp_only
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_bits_do_not_depend_on_the_number_of_threads(approximate):
    x, bias, dout = torch.randn(1031, 257), torch.randn(257), torch.randn(1031, 257)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(run(_ours(approximate, None), [x, bias], dout))
    for first, other in ((results[0], results[1]), (results[1], results[2])):
        assert all(map(torch.equal, first, other))


@reference_only
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_gradcheck_of_the_reference(approximate):
    x, bias = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(_ours(approximate, "torch"), (x.requires_grad_(), bias.requires_grad_()))


def test_opcheck():
    x, bias = torch.randn(3, 70), torch.randn(70)
    for tensors in ((x, bias), (x.clone().requires_grad_(), bias.clone().requires_grad_()), (x, None)):
        torch.library.opcheck(torch.ops.fasttune.bias_gelu.default, (*tensors, True, FUSED))
    torch.library.opcheck(
        torch.ops.fasttune.bias_gelu_backward.default, (torch.randn(3, 70), x, bias, False, True, False, FUSED)
    )


def test_compiles_as_one_graph():
    x, bias = torch.randn(8, 96), torch.randn(96)
    compiled = torch.compile(_ours("tanh", None), fullgraph=True, backend="aot_eager")
    dout = torch.randn(8, 96)
    assert all(map(torch.equal, run(compiled, [x, bias], dout), run(_ours("tanh", None), [x, bias], dout)))


def test_backward_keeps_x_and_bias_alone():
    x, bias = torch.randn(8, 96, requires_grad=True), torch.randn(96, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.bias_gelu(x, bias)
    assert {tensor.data_ptr() for tensor in kept} <= {x.data_ptr(), bias.data_ptr()}


def test_bad_input_is_named():
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="approximate is 'fast'; expected 'none' or 'tanh'"):
        ops.bias_gelu(x, None, approximate="fast")
    with pytest.raises(ValueError, match=r"bias is float32 of shape \(4,\) on cpu; expected shape \(3,\)"):
        ops.bias_gelu(x, torch.randn(4))
    with pytest.raises(TypeError, match="bias is float64 .*expected torch.float32 like x, or float32"):
        ops.bias_gelu(x, torch.randn(3).double())
    with pytest.raises(TypeError, match="x is int64"):
        ops.bias_gelu(torch.arange(3), None)
    with pytest.raises(ValueError, match="expected at least one dimension"):
        ops.bias_gelu(torch.tensor(1.0), None)
    with pytest.raises(RuntimeError, match=rf"'{FUSED}' was asked for bias_gelu, but .*float64"):
        ops.bias_gelu(x.double(), None, backend=FUSED)


@reference_only
def test_reference_is_torchs_gelu():
    x, bias = torch.randn(4, 6), torch.randn(6)
    assert torch.equal(ops.bias_gelu(x, bias, backend="torch"), F.gelu(x + bias))
