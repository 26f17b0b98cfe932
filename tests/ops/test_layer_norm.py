"""ops.layer_norm and ops.dropout_add_layer_norm against their torch references, and the promises around them."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from fused import FUSED, cpp_only, either, needs_fused, reference_only
from hypothesis import given, settings
from oracle import DTYPES, SWEEP_SLACK, assert_parity, assert_same_math, run

from fasttune import ops
from fasttune.ops._reference.philox import elementwise_keep_mask, keep_scale

# 1 and 7: less than a vector; 16: one; 100, 1000: ragged ends; 768, 1024, 3072: real models; 5000: long and ragged.
COLUMNS = either((1, 7, 16, 100, 768, 1000, 1024, 3072, 5000), (1, 7, 100, 768, 5000))
# Fixed: where a tensor has one or three elements, stock's error is a sample of that size and may be 0 by luck.
SEED = 2
NAMES = ["x", "residual", "weight", "bias"]


def _norm(backend, **options):
    return lambda x, weight=None, bias=None: ops.layer_norm(x, weight, bias, backend=backend, **options)


def _fused(backend, seed=SEED, **options):
    def function(x, residual, weight=None, bias=None):
        torch.manual_seed(seed)
        result = ops.dropout_add_layer_norm(x, residual, weight, bias, backend=backend, **options)
        return torch.cat(result) if isinstance(result, tuple) else result  # both upstream gradients in one

    return function


def _inputs(rows, columns, dtype, parameter_dtype=None, offset=0.0):
    x, residual = torch.randn(rows, columns), torch.randn(rows, columns) + offset
    weight, bias = torch.randn(columns) + 1, torch.randn(columns)
    return [
        *(tensor.to(dtype) for tensor in (x, residual)),
        *(tensor.to(parameter_dtype or dtype) for tensor in (weight, bias)),
    ]


def _shapes():
    return [
        (rows, columns)
        for columns in COLUMNS
        for rows in ((0, 1, 3, 257) if columns <= 100 else (3,))
        if rows != 257 or columns == either(columns, 100)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_matches_the_reference(isa, dtype):
    for rows, columns in _shapes():
        torch.manual_seed(SEED)
        x, _, weight, bias = _inputs(rows, columns, dtype)
        assert_same_math(_norm(FUSED), _norm("torch"), [x, weight, bias], ["x", "weight", "bias"])


@pytest.mark.parametrize("prenorm", [False, True], ids=["postnorm", "prenorm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_matches_the_reference(isa, dtype, prenorm):
    for rows, columns in _shapes():
        torch.manual_seed(SEED)
        options = {"dropout_p": 0.25, "prenorm": prenorm}
        assert_same_math(_fused(FUSED, **options), _fused("torch", **options), _inputs(rows, columns, dtype), NAMES)


@pytest.mark.parametrize("there", [("weight",), ("bias",), ()], ids=["weight alone", "bias alone", "neither"])
def test_parameters_that_are_not_there(isa, there):
    """ModernBERT's norms have no bias."""
    x, residual, *parameters = _inputs(9, 100, torch.float32)
    given = [parameter for name, parameter in zip(("weight", "bias"), parameters, strict=True) if name in there]

    def parted(function):
        def call(*tensors):
            rest = dict(zip(there, tensors[-len(there) :], strict=True)) if there else {}
            return function(*tensors[: len(tensors) - len(there)], **rest)

        return call

    for ours, stock, inputs in (
        (_norm(FUSED), _norm("torch"), [x]),
        *((_fused(FUSED, prenorm=p), _fused("torch", prenorm=p), [x, residual]) for p in (False, True)),
    ):
        assert_same_math(parted(ours), parted(stock), [*inputs, *given], [*NAMES[: len(inputs)], *there])


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual_is_wide", [False, True])
def test_fp32_parameters_beside_16_bit_tensors(isa, x_dtype, residual_is_wide):
    """What autocast leaves: 16-bit x, fp32 parameters, and in post-norm layers an fp32 residual."""
    x, residual, weight, bias = _inputs(33, 100, x_dtype, torch.float32)
    if residual_is_wide:
        residual = residual.float() + 1e-4
    for prenorm in (False, True):
        options = {"dropout_p": 0.25, "prenorm": prenorm}
        ours, stock, names = _fused(FUSED, **options), _fused("torch", **options), NAMES
        assert_same_math(ours, stock, [x, residual, weight, bias], names)
    assert_same_math(_norm(FUSED), _norm("torch"), [x, weight, bias], ["x", "weight", "bias"])


@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_rows_far_from_zero_lose_nothing(isa, offset):
    for columns in (100, 768, 5000):
        x, _, weight, bias = _inputs(64, columns, torch.float32)
        assert_same_math(_norm(FUSED), _norm("torch"), [x + offset, weight, bias], ["x", "weight", "bias"])


@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_the_mean_that_backward_reads_is_right_to_the_last_bit(isa, offset):
    """Its rounding would show as a part of every normalised value; stock's is as large, so parity alone allows it."""
    for columns in (100, 768, 5000):
        x = torch.randn(64, columns) + offset
        mean = torch.ops.fasttune.layer_norm(x, None, None, 1e-5, FUSED)[1][0]
        assert (mean.double() - x.double().mean(1)).abs().max() <= torch.finfo(torch.float32).eps * offset


@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_rows_without_variance(isa, eps):
    x = torch.tensor([[0.0], [3.7], [-1e4]]).expand(3, 300).clone()
    out, grad = run(_norm(FUSED, eps=eps), [x], torch.randn(3, 300))
    exact_out, exact_grad = run(_norm("torch", eps=eps), [x.double()], torch.randn(3, 300).double())
    assert torch.equal(out, exact_out.float())
    assert torch.isfinite(grad).all()
    dout = torch.randn(3, 300)
    (_, grad), (_, exact_grad) = run(_norm(FUSED, eps=eps), [x], dout), run(_norm("torch", eps=eps), [x.double()], dout)
    (_, stock_grad) = run(_norm("torch", eps=eps), [x], dout)
    assert_parity(grad, stock_grad, exact_grad, "grad x")


@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_is_the_generators_bit_for_bit(isa, dtype):
    rows, columns, p = 37, 300, 0.3
    row_ids = torch.randint(0, 2**40, (2 * rows,))[::2]
    residual = torch.zeros(rows, columns, dtype=dtype)
    x = torch.ones(rows, columns, dtype=dtype, requires_grad=True)
    torch.manual_seed(3)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    torch.manual_seed(3)
    _, total = ops.dropout_add_layer_norm(
        x, residual, None, None, dropout_p=p, prenorm=True, row_ids=row_ids, backend=FUSED
    )
    mask = elementwise_keep_mask(row_ids, columns, seed, p)
    expected = mask * torch.tensor(keep_scale(p)).to(dtype)
    assert torch.equal(total, expected)
    (dx,) = torch.autograd.grad(total, x, torch.ones_like(total))
    assert torch.equal(dx, expected)


def test_gradients_of_either_result_alone(isa):
    """dy None and dsum None: each alone, and both together are their sum."""
    x, residual, weight, bias = (tensor.requires_grad_() for tensor in _inputs(5, 70, torch.float32))
    dout, dsum = torch.randn(5, 70), torch.randn(5, 70)

    def gradients(backend, d_out, d_sum):
        torch.manual_seed(4)
        out, total = ops.dropout_add_layer_norm(x, residual, weight, bias, dropout_p=0.2, prenorm=True, backend=backend)
        results = [(out, d_out), (total, d_sum)]
        used = [pair for pair in results if pair[1] is not None]
        return torch.autograd.grad(
            [result for result, _ in used], [x, residual, weight, bias], [grad for _, grad in used], allow_unused=True
        )

    for d_out, d_sum in ((dout, None), (None, dsum), (dout, dsum)):
        ours, reference = gradients(FUSED, d_out, d_sum), gradients("torch", d_out, d_sum)
        for mine, stock in zip(ours, reference, strict=True):
            assert (mine is None) == (stock is None)
            if mine is not None:
                torch.testing.assert_close(mine, stock)


@cpp_only  # of Triton see tests/kernels
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_gradients_that_nobody_needs_are_not_computed(isa, dropout_p, monkeypatch):
    tensors, dout = _inputs(5, 70, torch.float32), torch.randn(5, 70)
    every = run(_fused(FUSED, dropout_p=dropout_p), tensors, dout)[1:]
    wanted = []
    library = ops.layer_norm.__globals__["_cpp"].library
    backward = library.layer_norm_backward
    monkeypatch.setattr(library, "layer_norm_backward", lambda *args: wanted.append(args[9:13]) or backward(*args))
    for i in range(4):
        inputs = [tensor.clone().requires_grad_(i == j) for j, tensor in enumerate(tensors)]
        (grad,) = torch.autograd.grad(_fused(FUSED, dropout_p=dropout_p)(*inputs), inputs[i], dout)
        assert torch.equal(grad, every[i])
        assert sum(address != 0 for address in wanted[-1]) == 1


def test_sum_is_exact_and_optional():
    x, residual, weight, bias = _inputs(9, 200, torch.bfloat16)
    torch.manual_seed(0)
    out, total = ops.dropout_add_layer_norm(x, residual, weight, bias, dropout_p=0.1, prenorm=True)
    assert torch.equal(out, ops.layer_norm(total, weight, bias))
    with torch.no_grad():  # post-norm inference stores no sum
        torch.manual_seed(0)
        assert torch.equal(out, ops.dropout_add_layer_norm(x, residual, weight, bias, dropout_p=0.1))


def test_dropout_of_everything_leaves_the_residual(isa):
    x, residual, weight, bias = _inputs(4, 90, torch.float32)
    x.requires_grad_()
    out, total = ops.dropout_add_layer_norm(x, residual, weight, bias, dropout_p=1.0, prenorm=True)
    assert torch.equal(total, residual)
    assert not torch.autograd.grad(out.sum(), x)[0].any()


@needs_fused
@settings(max_examples=either(40, 8), deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=2),
    columns=st.integers(20, 300),
    step=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES),
    prenorm=st.booleans(),
    dropout_p=st.sampled_from([0.0, 1e-6, 0.1, 0.9]),
    parameters=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_strides(shape, columns, step, dtype, prenorm, dropout_p, parameters, seed):
    torch.manual_seed(seed)
    x, residual = (torch.randn(columns * step, 2, *shape).to(dtype).movedim(0, -1)[..., ::step] for _ in range(2))
    weight, bias = (torch.randn(columns * step).to(dtype)[::step] for _ in range(2))
    inputs = [x, residual, weight, bias][: 2 + parameters]
    options = {"dropout_p": dropout_p, "prenorm": prenorm}
    assert_same_math(
        _fused(FUSED, seed, **options),
        _fused("torch", seed, **options),
        inputs,
        NAMES[: 2 + parameters],
        slack=SWEEP_SLACK,
    )
    inputs.pop(1)
    assert_same_math(_norm(FUSED), _norm("torch"), inputs, ["x", "weight", "bias"][: 1 + parameters], slack=SWEEP_SLACK)


@cpp_only
def test_bits_do_not_depend_on_the_number_of_threads():
    inputs = _inputs(1031, 257, torch.float32)
    dout = torch.randn(2 * 1031, 257)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(run(_fused(None, dropout_p=0.1, prenorm=True), inputs, dout))
    for first, other in ((results[0], results[1]), (results[1], results[2])):
        assert all(map(torch.equal, first, other))


@reference_only
def test_gradcheck_of_the_reference():
    inputs = tuple(tensor.requires_grad_() for tensor in _inputs(3, 5, torch.float64))
    assert torch.autograd.gradcheck(_fused("torch", dropout_p=0.4, prenorm=True), inputs)
    assert torch.autograd.gradcheck(_norm("torch"), inputs[1:])


@reference_only
def test_reference_is_torchs_layer_norm():
    x, residual, weight, bias = _inputs(6, 33, torch.float32)
    assert torch.equal(ops.layer_norm(x, weight, bias, backend="torch"), F.layer_norm(x, (33,), weight, bias))
    fused = ops.dropout_add_layer_norm(x, residual, weight, bias, backend="torch")
    assert torch.equal(fused, F.layer_norm(x + residual, (33,), weight, bias))


def test_opcheck():
    x, residual, weight, bias = _inputs(3, 70, torch.float32)
    seed, statistics = torch.tensor([3]), torch.rand(2, 3)
    operators = torch.ops.fasttune
    for grad in (False, True):
        tensors = [tensor.clone().requires_grad_(grad) for tensor in (x, residual, weight, bias)]
        torch.library.opcheck(operators.layer_norm.default, (tensors[0], *tensors[2:], 1e-5, FUSED))
        for keep_sum in (False, True) if not grad else (True,):
            arguments = (*tensors, torch.arange(3), seed, 0.2, 1e-5, keep_sum, FUSED)
            torch.library.opcheck(operators.dropout_add_layer_norm.default, arguments)
    flags = (torch.float32, True, False, True, False, FUSED)
    arguments = (x, None, residual, weight, bias, statistics, None, seed, 0.2, *flags)
    torch.library.opcheck(operators.layer_norm_backward.default, arguments)


@pytest.mark.parametrize("prenorm", [False, True], ids=["postnorm", "prenorm"])
def test_compiles_as_one_graph_and_keeps_its_mask(prenorm):
    function = _fused(None, dropout_p=0.4, prenorm=prenorm)
    inputs, dout = _inputs(8, 96, torch.float32), torch.randn(8 * (1 + prenorm), 96)

    def seeded(*tensors):  # manual_seed stays outside the graph
        result = ops.dropout_add_layer_norm(*tensors, dropout_p=0.4, prenorm=prenorm)
        return torch.cat(result) if prenorm else result

    compiled = torch.compile(seeded, fullgraph=True, backend="aot_eager")

    def run_compiled(*tensors):
        torch.manual_seed(SEED)
        return compiled(*tensors)

    assert all(map(torch.equal, run(run_compiled, inputs, dout), run(function, inputs, dout)))


def test_checkpointing_regenerates_the_mask():
    inputs, dout = _inputs(8, 96, torch.float32), torch.randn(8, 96)
    function = _fused(None, dropout_p=0.4)

    def checkpointed(*tensors):
        return torch.utils.checkpoint.checkpoint(
            lambda *tensors: ops.dropout_add_layer_norm(*tensors, dropout_p=0.4), *tensors, use_reentrant=False
        )

    def seeded(*tensors):
        torch.manual_seed(SEED)
        return checkpointed(*tensors)

    assert all(map(torch.equal, run(seeded, inputs, dout), run(function, inputs, dout)))


def test_bad_input_is_named():
    x, weight = torch.randn(2, 3), torch.randn(3)
    with pytest.raises(ValueError, match=r"weight is float32 of shape \(4,\) on cpu; expected shape \(3,\)"):
        ops.layer_norm(x, torch.randn(4), None)
    with pytest.raises(TypeError, match="bias is int64"):
        ops.layer_norm(x, weight, torch.arange(3))
    with pytest.raises(TypeError, match="weight is bfloat16 .*expected torch.float32 like x"):
        ops.layer_norm(x, weight.bfloat16(), None)
    with pytest.raises(ValueError, match="expected at least one dimension"):
        ops.layer_norm(torch.tensor(1.0), None, None)
    with pytest.raises(ValueError, match=r"residual is float32 of shape \(3,\) on cpu; expected shape \(2, 3\)"):
        ops.dropout_add_layer_norm(x, torch.randn(3), weight, None)
    with pytest.raises(TypeError, match="residual is a NoneType; expected a torch.Tensor"):
        ops.dropout_add_layer_norm(x, None, weight, None)
    with pytest.raises(ValueError, match="dropout_p is -0.1; expected a probability"):
        ops.dropout_add_layer_norm(x, x, weight, None, dropout_p=-0.1)
    with pytest.raises(ValueError, match=r"row_ids is int64 of shape \(3,\) on cpu; expected shape \(2,\)"):
        ops.dropout_add_layer_norm(x, x, weight, None, dropout_p=0.1, row_ids=torch.arange(3))
    with pytest.raises(RuntimeError, match=rf"'{FUSED}' was asked for layer_norm, but .*float64"):
        ops.layer_norm(x.double(), None, None, backend=FUSED)
