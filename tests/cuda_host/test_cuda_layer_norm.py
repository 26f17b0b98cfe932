"""The CUDA LayerNorm family, run on the host, against stock torch in the tested dtype and in float64."""

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, assert_same_math

from cuda_host import building
from fasttune import ops

NAMES = ("x", "weight", "bias")

NEEDS_CPP = pytest.mark.skipif(
    building.ON_GPU or "cpp" not in ops.available_backends("layer_norm"),
    reason="needs the compiled CPU library, and CPU tensors",
)


def inputs(rows, columns, dtype):
    return [torch.randn(rows, columns).to(dtype), *(torch.randn(2, columns) + 1).to(dtype)]


def norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


# A warp a row and four rows a block, the last one short of work; two warps; three warps of odd rows; two chunks of
# columns a warp; vectors of 8 and single elements.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(37, 200), (11, 301), (5, 768), (2, 4100), (1, 1)])
def test_layer_norm_matches_stock(rows, columns, dtype):
    def fused(*args):
        return ops.layer_norm(*args, backend="cuda")

    assert_same_math(fused, norm, inputs(rows, columns, dtype), NAMES)


@pytest.mark.parametrize("there", ["weight", "bias", ""])
@pytest.mark.parametrize("operation", [ops.layer_norm, ops.layer_norm_gelu, ops.gelu_layer_norm])
def test_parameters_that_are_not_there(operation, there):
    x, weight, bias = inputs(11, 264, torch.float32)
    tensors = [x, *([weight] if there == "weight" else []), *([bias] if there == "bias" else [])]

    def on(backend):
        def function(x, parameter=None):
            both = (parameter, None) if there == "weight" else (None, parameter)
            return operation(x, *both, backend=backend)

        return function

    assert_same_math(on("cuda"), on("torch"), tensors, ("x", there)[: len(tensors)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_before_and_after(approximate, dtype):
    options = {"approximate": approximate, "backend": "cuda"}
    assert_same_math(
        lambda *args: ops.layer_norm_gelu(*args, **options),
        lambda *args: F.gelu(norm(*args), approximate=approximate),
        inputs(30, 296, dtype),
        NAMES,
    )
    assert_same_math(
        lambda *args: ops.gelu_layer_norm(*args, **options),
        lambda x, *args: norm(F.gelu(x, approximate=approximate), *args),
        inputs(30, 296, dtype),
        NAMES,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prenorm", [False, True])
def test_dropout_add_layer_norm_is_the_references(prenorm, dtype):
    row_ids = torch.arange(33) * 3 + 2**33

    def run_on(backend):
        def function(x, residual, weight, bias):
            torch.manual_seed(1)
            options = {"dropout_p": 0.25, "prenorm": prenorm, "row_ids": row_ids, "backend": backend}
            out = ops.dropout_add_layer_norm(x, residual, weight, bias, **options)
            return out[0] + out[1] if prenorm else out

        return function

    tensors = inputs(33, 300, dtype)
    tensors.insert(1, torch.randn(33, 300).to(dtype))
    assert_same_math(run_on("cuda"), run_on("torch"), tensors, ("x", "residual", "weight", "bias"))


# Against the C++ kernel: the reference rounds dropout(x) to x's dtype, the kernels do not.
@NEEDS_CPP
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_x_beside_a_float32_residual(x_dtype):
    x, residual = torch.randn(9, 264).to(x_dtype).requires_grad_(), torch.randn(9, 264, requires_grad=True)
    weight, bias = torch.randn(2, 264)

    def results(backend):
        torch.manual_seed(5)
        out = ops.dropout_add_layer_norm(x, residual, weight, bias, dropout_p=0.2, backend=backend)
        return (out, *torch.autograd.grad(out.square().sum(), (x, residual)))

    for ours, theirs in zip(results("cuda"), results("cpp"), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


def test_parameters_may_be_float32_beside_bf16_and_frozen():
    x = torch.randn(40, 96).bfloat16().requires_grad_()
    weight, bias = torch.randn(96, requires_grad=True), torch.randn(96)
    out = ops.layer_norm(x, weight, bias, backend="cuda")
    dx, dweight = torch.autograd.grad(out.sum(), (x, weight))
    assert (out.dtype, dx.dtype, dweight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    out = ops.layer_norm(x.detach().requires_grad_(), None, None, backend="cuda")
    assert torch.autograd.grad(out.sum(), x, allow_unused=True) == (None,)


def test_rows_far_from_zero_lose_nothing():
    def fused(*args):
        return ops.layer_norm(*args, backend="cuda")

    x, weight, bias = inputs(5, 768, torch.float32)
    assert_same_math(fused, norm, [x + 1000.0, weight, bias], NAMES)


def test_no_rows():
    x, weight, bias = (tensor.requires_grad_() for tensor in inputs(0, 64, torch.float32))
    grads = torch.autograd.grad(ops.layer_norm(x, weight, bias, backend="cuda").sum(), (x, weight, bias))
    assert [tuple(grad.shape) for grad in grads] == [(0, 64), (64,), (64,)]
    assert (grads[1] == 0).all()


def test_rows_that_are_too_wide_are_refused():
    with pytest.raises(ValueError, match="x has 8193 columns; the cuda backend takes at most 8192"):
        ops.layer_norm(torch.randn(1, 8193), None, None, backend="cuda")
    with pytest.raises(ValueError, match="x has 4097 columns; the cuda backend takes at most 4096"):
        ops.layer_norm_gelu(torch.randn(1, 4097), None, None, backend="cuda")
