"""ops.gated_activation against torch's composition: one tensor of two halves or two tensors, six activations."""

import hypothesis.strategies as st
import pytest
import torch
from extremes import assert_no_worse, combinations
from fused import FUSED, cpp_only, either, needs_fused, reference_only
from hypothesis import given, settings
from oracle import DTYPES, SWEEP_SLACK, assert_same_math, run

from fasttune import ops
from fasttune.ops._activations import ACTIVATIONS
from fasttune.ops._reference.activation import gated_activation as reference

# 7: less than a vector; 16: one; 100, 1000: ragged ends; 1152: ModernBERT-base.
COLUMNS = either((7, 16, 100, 1000, 1152), (7, 1000))
SEED = 1
NAMES = ["a", "bias"]


def ours(activation, backend=FUSED):
    return lambda a, bias=None: ops.gated_activation(a, activation=activation, bias=bias, backend=backend)


def stock(activation):
    return lambda a, bias=None: reference(a, None, bias, activation)


def ours_of_two(activation):
    return lambda a, b, bias=None: ops.gated_activation(a, b, activation=activation, bias=bias, backend=FUSED)


def stock_of_two(activation):
    return lambda a, b, bias=None: reference(a, b, bias, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_match_the_reference(isa, dtype, activation):
    for columns in COLUMNS:
        for rows in (0, 3, 257) if columns == 100 else (3,):
            torch.manual_seed(SEED)
            a, bias = torch.randn(rows, 2 * columns).mul(3).to(dtype), torch.randn(2 * columns).to(dtype)
            assert_same_math(ours(activation), stock(activation), [a, bias], NAMES)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_tensors_match_the_reference(isa, dtype, activation):
    torch.manual_seed(SEED)
    a, b = torch.randn(2, 33, 100).mul(3).to(dtype)
    assert_same_math(ours_of_two(activation), stock_of_two(activation), [a, b], ["a", "b"])
    with_bias = [a, b, torch.randn(200).to(dtype)]
    assert_same_math(ours_of_two(activation), stock_of_two(activation), with_bias, ["a", "b", "bias"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_bias_beside_16_bit_tensors(isa, dtype):
    torch.manual_seed(0)
    a, bias = torch.randn(33, 200).to(dtype), torch.randn(200)
    upside_down = [lambda a, bias: stock("silu")(a.flip(0), bias).flip(0)]  # a sum over rows in another order
    assert_same_math(ours("silu"), stock("silu"), [a, bias], NAMES, again=upside_down)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_numbers(isa, dtype, activation):
    assert_no_worse(ours_of_two(activation), stock_of_two(activation), combinations(2, dtype))


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_chunks_of_one_tensor_are_read_where_they_lie(isa, order, monkeypatch):
    """Chunks along the last dimension; along the first they are contiguous. No copy is made of either."""
    whole = torch.randn(6, 5, 200)
    a, b = whole.chunk(2, -1 if order == "columns" else 0)
    copies = []
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x, f=torch.Tensor.contiguous: copies.append(x) or f(x))
    out = ops.gated_activation(a, b, backend=FUSED)
    assert all(x.is_contiguous() for x in copies)
    monkeypatch.undo()
    torch.testing.assert_close(out, reference(a, b, None, "gelu"))
    assert_same_math(ours_of_two("gelu"), stock_of_two("gelu"), [a, b], ["a", "b"])


@needs_fused
@settings(max_examples=either(40, 8), deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=2),
    columns=st.integers(20, 150),
    step=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(list(ACTIVATIONS)),
    with_bias=st.booleans(),
    two=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_strides(shape, columns, step, dtype, activation, with_bias, two, seed):
    torch.manual_seed(seed)
    whole = torch.randn(2 * columns * step, *shape).to(dtype).movedim(0, -1)
    bias = torch.randn(2 * columns * step).to(dtype)[::step]
    if two:
        a, b = whole.chunk(2, -1)
        inputs = [a[..., ::step], b[..., ::step], bias][: 2 + with_bias]
        sides = ours_of_two(activation), stock_of_two(activation)
    else:
        inputs, sides = [whole[..., ::step], bias][: 1 + with_bias], (ours(activation), stock(activation))
    names = (["a", "b", "bias"] if two else NAMES)[: len(inputs)]
    assert_same_math(*sides, inputs, names, slack=SWEEP_SLACK)


def test_gradients_that_nobody_needs_are_not_computed(isa):
    tensors, dout = [torch.randn(5, 70), torch.randn(5, 70), torch.randn(140)], torch.randn(5, 70)
    every = run(ours_of_two("silu"), tensors, dout)[1:]
    for i, expected in enumerate(every):
        inputs = [tensor.clone().requires_grad_(i == j) for j, tensor in enumerate(tensors)]
        (grad,) = torch.autograd.grad(ours_of_two("silu")(*inputs), inputs[i], dout)
        assert torch.equal(grad, expected)
    whole, bias = torch.cat(tensors[:2], -1), tensors[2].clone().requires_grad_()
    (grad,) = torch.autograd.grad(ours("silu")(whole, bias), bias, dout)
    assert torch.equal(grad, every[2])


def test_halves_have_the_bits_of_two_tensors_and_one_gradient(isa):
    a, bias, dout = torch.randn(33, 200), torch.randn(200), torch.randn(33, 100)
    whole = run(ours("gelu"), [a, bias], dout)
    apart = run(ours_of_two("gelu"), [*(half.contiguous() for half in a.chunk(2, -1)), bias], dout)
    assert torch.equal(whole[0], apart[0])
    assert torch.equal(whole[1], torch.cat(apart[1:3], -1))
    assert whole[1].is_contiguous()
    assert torch.equal(whole[2], apart[3])


@cpp_only
def test_bits_do_not_depend_on_the_number_of_threads():
    a, bias, dout = torch.randn(1031, 514), torch.randn(514), torch.randn(1031, 257)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(run(ours("gelu", None), [a, bias], dout))
    for first, other in ((results[0], results[1]), (results[1], results[2])):
        assert all(map(torch.equal, first, other))


@reference_only
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_reference(activation):
    torch.manual_seed(SEED)
    a, bias = torch.randn(3, 10, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    assert torch.autograd.gradcheck(ours(activation, "torch"), (a.requires_grad_(), bias.requires_grad_()))


@reference_only
def test_reference_is_the_gate_of_modern_bert_and_of_t5():
    a = torch.randn(4, 12)
    activated, gate = a.chunk(2, -1)
    stock = torch.nn.functional.gelu(activated) * gate
    assert torch.equal(ops.gated_activation(a, backend="torch"), stock)
    assert torch.equal(ops.gated_activation(activated, gate, backend="torch"), stock)


def test_opcheck():
    a, b, bias = torch.randn(3, 70), torch.randn(3, 70), torch.randn(140)
    whole = torch.cat((a, b), -1)
    for tensors in ((a, b, bias), (whole, None, bias), (whole, None, None)):
        for grad in (False, True):
            inputs = [None if x is None else x.clone().requires_grad_(grad) for x in tensors]
            torch.library.opcheck(torch.ops.fasttune.gated_activation.default, (*inputs, 3, FUSED))
    arguments = (torch.randn(3, 70), whole, None, bias, 1, True, False, False, FUSED)
    torch.library.opcheck(torch.ops.fasttune.gated_activation_backward.default, arguments)


def test_compiles_as_one_graph():
    inputs, dout = [torch.randn(8, 192), torch.randn(192)], torch.randn(8, 96)
    compiled = torch.compile(ours("gelu_tanh", None), fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, run(compiled, inputs, dout), run(ours("gelu_tanh", None), inputs, dout)))


def test_backward_keeps_the_arguments_alone():
    a, bias = torch.randn(8, 192, requires_grad=True), torch.randn(192, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.gated_activation(a, bias=bias)
    assert {tensor.data_ptr() for tensor in kept} <= {a.data_ptr(), bias.data_ptr()}


def test_bad_input_is_named():
    a = torch.randn(2, 4)
    with pytest.raises(ValueError, match="activation is 'swish'; expected one of gelu, gelu_tanh, silu, relu, quick"):
        ops.gated_activation(a, activation="swish")
    with pytest.raises(ValueError, match=r"a is float32 of shape \(2, 3\) on cpu without b; expected an even last"):
        ops.gated_activation(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"b is float32 of shape \(2, 3\) on cpu; expected shape \(2, 4\) \(like a\)"):
        ops.gated_activation(a, torch.randn(2, 3))
    with pytest.raises(TypeError, match="b is float16 .*expected torch.float32 like a"):
        ops.gated_activation(a, a.half())
    with pytest.raises(ValueError, match=r"bias is float32 of shape \(2,\) on cpu; expected shape \(4,\) \(one per"):
        ops.gated_activation(a, bias=torch.randn(2))
    with pytest.raises(ValueError, match=r"bias is float32 of shape \(4,\) on cpu; expected shape \(8,\) \(one per"):
        ops.gated_activation(a, a, bias=torch.randn(4))
    with pytest.raises(TypeError, match="bias is float64 .*expected torch.float32 like a, or float32"):
        ops.gated_activation(a, bias=torch.randn(4).double())
    with pytest.raises(TypeError, match="a is int64"):
        ops.gated_activation(torch.arange(4))
    with pytest.raises(ValueError, match="expected at least one dimension"):
        ops.gated_activation(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=rf"'{FUSED}' was asked for gated_activation, but .*float64"):
        ops.gated_activation(a.double(), backend=FUSED)
