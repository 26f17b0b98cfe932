"""ops.layer_norm_gelu and ops.gelu_layer_norm against their torch references."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from fused import FUSED, cpp_only, either, needs_fused, reference_only
from hypothesis import given, settings
from oracle import DTYPES, SWEEP_SLACK, assert_same_math, run

from fasttune import ops

OPERATIONS = ("layer_norm_gelu", "gelu_layer_norm")
APPROXIMATE = ("none", "tanh")
# 1 and 7: less than a vector; 16: one; 100, 1000: ragged ends; 768, 1024, 3072: real models; 5000: long and ragged.
COLUMNS = either((1, 7, 16, 100, 768, 1000, 1024, 3072, 5000), (1, 100, 5000))
# Fixed: where a tensor has one or three elements, stock's error is a sample of that size and may be 0 by luck.
SEED = 1
NAMES = ["x", "weight", "bias"]


def _on(backend, operation, approximate="none", **options):
    function = getattr(ops, operation)
    return lambda x, weight=None, bias=None: function(
        x, weight, bias, approximate=approximate, backend=backend, **options
    )


def _inputs(rows, columns, dtype, parameter_dtype=None):
    x, weight, bias = torch.randn(rows, columns) * 2, torch.randn(columns) + 1, torch.randn(columns)
    return [x.to(dtype), weight.to(parameter_dtype or dtype), bias.to(parameter_dtype or dtype)]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_match_the_reference(isa, dtype, approximate, operation):
    for columns in COLUMNS:
        for rows in (0, 1, 3, 257) if columns in (7, 100) else (3,):
            torch.manual_seed(SEED)
            ours, stock = _on(FUSED, operation, approximate), _on("torch", operation, approximate)
            assert_same_math(ours, stock, _inputs(rows, columns, dtype), NAMES)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_parameters_beside_16_bit_x(isa, dtype, operation):
    inputs = _inputs(33, 100, dtype, torch.float32)
    assert_same_math(_on(FUSED, operation), _on("torch", operation), inputs, NAMES)


@needs_fused
@settings(max_examples=either(30, 8), deadline=None)
@given(
    operation=st.sampled_from(OPERATIONS),
    shape=st.lists(st.integers(0, 9), max_size=2),
    columns=st.integers(20, 300),
    step=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES),
    approximate=st.sampled_from(APPROXIMATE),
    eps=st.sampled_from([1e-12, 1e-5, 1e-3]),
    parameters=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_strides(operation, shape, columns, step, dtype, approximate, eps, parameters, seed):
    torch.manual_seed(seed)
    x = torch.randn(columns * step, 2, *shape).to(dtype).movedim(0, -1)[..., ::step]
    weight, bias = (torch.randn(columns * step).to(dtype)[::step] for _ in range(2))
    ours, stock = (_on(backend, operation, approximate, eps=eps) for backend in (FUSED, "torch"))
    assert_same_math(ours, stock, [x, weight, bias][: 1 + parameters], NAMES[: 1 + parameters], slack=SWEEP_SLACK)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_that_nobody_needs_are_not_computed(isa, operation):
    tensors, dout = _inputs(5, 70, torch.float32), torch.randn(5, 70)
    every = run(_on(FUSED, operation), tensors, dout)[1:]
    for i in range(3):
        inputs = [tensor.clone().requires_grad_(i == j) for j, tensor in enumerate(tensors)]
        (grad,) = torch.autograd.grad(_on(FUSED, operation)(*inputs), inputs[i], dout)
        assert torch.equal(grad, every[i])


@cpp_only
@pytest.mark.parametrize("operation", OPERATIONS)
def test_bits_do_not_depend_on_the_number_of_threads(operation):
    inputs, dout = _inputs(1031, 257, torch.float32), torch.randn(1031, 257)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(_on(None, operation), inputs, dout))
    assert all(map(torch.equal, *results))


@reference_only
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_gradcheck_of_the_reference(operation, approximate):
    inputs = tuple(tensor.requires_grad_() for tensor in _inputs(3, 5, torch.float64))
    assert torch.autograd.gradcheck(_on("torch", operation, approximate), inputs)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_opcheck(operation):
    inputs = _inputs(3, 70, torch.float32)
    overload = getattr(torch.ops.fasttune, operation).default
    for grad in (False, True):
        tensors = [tensor.clone().requires_grad_(grad) for tensor in inputs]
        torch.library.opcheck(overload, (*tensors, 1e-5, True, FUSED))
    backward = getattr(torch.ops.fasttune, f"{operation}_backward").default
    arguments = (torch.randn(3, 70), *inputs, torch.rand(2, 3), False, True, False, True, FUSED)
    torch.library.opcheck(backward, arguments)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles_as_one_graph(operation):
    inputs, dout = _inputs(8, 96, torch.float32), torch.randn(8, 96)
    function = _on(None, operation, "tanh")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, run(compiled, inputs, dout), run(function, inputs, dout)))


@reference_only
def test_references_are_torchs_compositions():
    x, weight, bias = _inputs(6, 33, torch.float32)
    after = ops.layer_norm_gelu(x, weight, bias, approximate="tanh", backend="torch")
    assert torch.equal(after, F.gelu(F.layer_norm(x, (33,), weight, bias), approximate="tanh"))
    before = ops.gelu_layer_norm(x, weight, bias, backend="torch")
    assert torch.equal(before, F.layer_norm(F.gelu(x), (33,), weight, bias))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_bad_input_is_named(operation):
    x = torch.randn(2, 3)
    function = getattr(ops, operation)
    with pytest.raises(ValueError, match="approximate is 'erf'; expected 'none' or 'tanh'"):
        function(x, None, None, approximate="erf")
    with pytest.raises(
        ValueError, match=rf"{operation}: weight is float32 of shape \(4,\) on cpu; expected shape \(3,\)"
    ):
        function(x, torch.randn(4), None)
    with pytest.raises(ValueError, match="expected at least one dimension"):
        function(torch.tensor(1.0), None, None)
    with pytest.raises(RuntimeError, match=rf"'{FUSED}' was asked for {operation}, but .*float64"):
        function(x.double(), None, None, backend=FUSED)
