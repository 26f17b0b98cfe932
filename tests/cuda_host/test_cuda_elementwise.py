"""The CUDA dropout and activations, run on the host: masks bit for bit, values against float64."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from extremes import assert_no_worse, combinations
from oracle import DTYPES, assert_same_math

from cuda_host import building
from cuda_host.masks import masks
from fasttune import ops
from fasttune.ops._activations import ACTIVATIONS
from fasttune.ops._reference.activation import bias_activation, gated_activation
from fasttune.ops._reference.philox import elementwise_keep_mask, keep_scale
from fasttune.ops.dropout import _dropout

NEEDS_CPP = pytest.mark.skipif(
    building.ON_GPU or "cpp" not in ops.available_backends("dropout"),
    reason="needs the compiled CPU library, and CPU tensors",
)


# 1: a single column; 131: one block of counters and a ragged tail; 1500: several warps; p = 1: nothing is kept.
@pytest.mark.parametrize(("rows", "columns", "p"), [(3, 1, 0.3), (33, 131, 0.1), (5, 1500, 0.5), (2, 128, 1.0)])
def test_mask_is_the_references_bit_for_bit(rows, columns, p):
    seed, ids = torch.tensor([-(2**62) + 12345]), torch.arange(rows) + 2**33 - 1
    out = _dropout(torch.ones(rows, columns), None, ids, seed, p, "cuda")
    assert torch.equal(out, elementwise_keep_mask(ids, columns, seed, p) * torch.tensor(keep_scale(p)))


@NEEDS_CPP
def test_masks_are_those_of_cpp():
    assert all(map(torch.equal, masks("cuda"), masks("cpp")))


@pytest.mark.skipif(building.ON_GPU, reason="compares on CPU tensors")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_masks_are_those_of_triton(tmp_path):
    script, file = building.HARNESS / "masks.py", tmp_path / "masks.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(building.ROOT)}
    subprocess.run([sys.executable, str(script), str(file)], env=environment, check=True)
    assert all(map(torch.equal, masks("cuda"), torch.load(file)))


@NEEDS_CPP
@pytest.mark.parametrize("columns", [384, 701])
def test_dropout_has_the_bits_of_cpp(columns):
    x, seed = torch.randn(70, columns), torch.tensor([7])
    assert torch.equal(*(_dropout(x, x, None, seed, 0.1, backend) for backend in ("cpp", "cuda")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 131), (9, 264), (0, 5), (3, 0)])
def test_dropout_matches_the_reference(dtype, shape):
    def run_on(backend):
        def function(x, residual):
            torch.manual_seed(1)
            return ops.dropout(x, dropout_p=0.25, residual=residual, backend=backend)

        return function

    inputs = [torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)]
    assert_same_math(run_on("cuda"), run_on("torch"), inputs, ["x", "residual"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(("rows", "columns"), [(75, 261), (40, 264), (1, 3)])
def test_bias_gelu_matches_stock(rows, columns, approximate, dtype):
    assert_same_math(
        lambda x, bias: ops.bias_gelu(x, bias, approximate=approximate, backend="cuda"),
        lambda x, bias: F.gelu(x + bias, approximate=approximate),
        [(3 * torch.randn(rows, columns)).to(dtype), torch.randn(columns).to(dtype)],
        ("x", "bias"),
    )


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_has_its_limits_at_the_ends(approximate):
    x = torch.tensor([[float("-inf"), -1e30, -40.0, 0.0, 40.0, 1e30, float("inf"), float("nan")]], requires_grad=True)
    out = ops.bias_gelu(x, None, approximate=approximate, backend="cuda")
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert out[0, 0].isnan()  # -inf · 0, as in stock
    assert out[0, 1:4].tolist() == [0.0, 0.0, 0.0]
    assert out[0, 4:7].tolist() == [40.0, torch.tensor(1e30).item(), float("inf")]
    assert dx[0, 1:6].tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert out[0, 7].isnan()
    assert dx[0, [0, 6, 7]].isnan().all()


# GELU has its tests above; one dtype for each of the others, since a type enters by load8 and store8 alone.
@pytest.mark.parametrize(
    ("activation", "dtype"),
    [("silu", torch.bfloat16), *((kind, torch.float32) for kind in ("relu", "quick_gelu", "relu2"))],
)
def test_bias_activation_matches_the_reference(activation, dtype):
    for rows, columns in ((75, 261), (40, 264)):
        assert_same_math(
            lambda x, bias: ops.bias_activation(x, bias, activation=activation, backend="cuda"),
            lambda x, bias: bias_activation(x, bias, activation),
            [(3 * torch.randn(rows, columns)).to(dtype), torch.randn(columns).to(dtype)],
            ("x", "bias"),
        )


# 264 columns: 16-byte accesses of halves and biases in every dtype; 261: none; 260: float32's halves alone lie on them.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(75, 261), (70, 264), (9, 260), (0, 5), (3, 0)])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
@pytest.mark.parametrize(("activation", "two"), [("gelu", False), ("silu", False), ("relu2", True)])
def test_gated_activation_matches_the_reference(rows, columns, bias_dtype, dtype, activation, two):
    a, bias = (3 * torch.randn(rows, 2 * columns)).to(dtype), torch.randn(2 * columns).to(bias_dtype or dtype)

    def fused(*tensors):
        *halves, bias = tensors
        return ops.gated_activation(*halves, bias=bias, activation=activation, backend="cuda")

    def stock(*tensors):
        *halves, bias = tensors
        return gated_activation(halves[0], halves[1] if two else None, bias, activation)

    def upside_down(*tensors):  # a sum over rows in another order
        return stock(*(half.flip(0) for half in tensors[:-1]), tensors[-1]).flip(0)

    inputs = [*(a.chunk(2, -1) if two else [a]), bias]
    assert_same_math(fused, stock, inputs, ("a", "b", "bias")[: len(inputs)], again=[upside_down])


def test_gates_of_other_strides_and_gradients_that_nobody_needs():
    a, b, dout = torch.randn(20, 300)[:, 8:272], torch.randn(264, 20).t(), torch.randn(20, 264)
    bias = torch.randn(528)

    def gradient(backend, i):
        inputs = [
            x.clone(memory_format=torch.preserve_format).requires_grad_(i == j) for j, x in enumerate((a, b, bias))
        ]
        out = ops.gated_activation(inputs[0], inputs[1], bias=inputs[2], backend=backend)
        return torch.autograd.grad(out, inputs[i], dout)[0]

    for i in range(3):
        torch.testing.assert_close(gradient("cuda", i), gradient("torch", i))
    torch.testing.assert_close(ops.gated_activation(a, b, backend="cuda"), ops.gated_activation(a, b, backend="torch"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_extreme_numbers(activation):
    x, dout = combinations(1, torch.float32)
    assert_no_worse(
        lambda x: ops.bias_activation(x, None, activation=activation, backend="cuda"),
        lambda x: bias_activation(x, None, activation),
        [x, dout],
    )
    assert_no_worse(
        lambda a, b: ops.gated_activation(a, b, activation=activation, backend="cuda"),
        lambda a, b: gated_activation(a, b, None, activation),
        combinations(2, torch.float32),
    )
