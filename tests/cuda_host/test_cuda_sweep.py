"""Random shapes, dtypes and options through every CUDA kernel on the host: 240 shapes against float64."""

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from oracle import DTYPES, SWEEP_SLACK, assert_same_math

from fasttune import ops

# The module-wide fixture that installs the harness is meant to stay the same for all examples of a test.
SWEEP = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 1000)


def on_both(function):
    """(cuda, torch) runs of function(backend, *tensors), with the same dropout seed."""

    def run_on(backend):
        def run(*tensors):
            torch.manual_seed(7)
            return function(backend, *tensors)

        return run

    return run_on("cuda"), run_on("torch")


@settings(max_examples=80, **SWEEP)
@given(
    sequences=st.integers(1, 2),
    queries=st.integers(1, 140),
    keys=st.integers(8, 140),  # one key alone: gradients are 0, in which stock is exact; test_cuda_attention has that
    heads=st.integers(1, 2),
    head_dim=st.integers(16, 128),
    causal=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
    dtype=dtypes,
    seed=seeds,
)
def test_attention(sequences, queries, keys, heads, head_dim, causal, dropout_p, dtype, seed):
    torch.manual_seed(seed)
    shapes = [(sequences, n, heads, head_dim) for n in (queries, keys, keys)]
    assert_same_math(
        *on_both(lambda backend, *x: ops.attention(*x, causal=causal, dropout_p=dropout_p, backend=backend)),
        [torch.randn(shape).to(dtype) for shape in shapes],
        ("query", "key", "value"),
        SWEEP_SLACK,
    )


@settings(max_examples=30, **SWEEP)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=5).filter(lambda lengths: max(lengths) >= 8),
    head_dim=st.sampled_from([16, 24, 64, 80, 128]),
    causal=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
def test_packed_attention(lengths, head_dim, causal, dtype, seed):
    torch.manual_seed(seed)
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    rows = sum(lengths)
    assert_same_math(
        *on_both(lambda backend, *x: ops.attention(*x, causal=causal, cu_seqlens=cu_seqlens, backend=backend)),
        [torch.randn(rows, 2, head_dim).to(dtype) for _ in range(3)],
        ("query", "key", "value"),
        SWEEP_SLACK,
    )


@settings(max_examples=50, **SWEEP)
@given(
    rows=st.integers(1, 40),
    columns=st.one_of(st.integers(2, 1200), st.integers(1, 150).map(lambda n: 8 * n)),
    kind=st.sampled_from(["plain", "dropout", "prenorm", "gelu after", "gelu before"]),
    dtype=dtypes,
    seed=seeds,
)
def test_layer_norms(rows, columns, kind, dtype, seed):
    torch.manual_seed(seed)
    x, residual = torch.randn(2, rows, columns).to(dtype)
    weight, bias = (torch.randn(2, columns) + 1).to(dtype)

    def function(backend, x, residual, weight, bias):
        if kind == "plain":
            return ops.layer_norm(x, weight, bias, backend=backend) + 0 * residual
        if kind == "gelu after":
            return ops.layer_norm_gelu(x, weight, bias, backend=backend) + 0 * residual
        if kind == "gelu before":
            return ops.gelu_layer_norm(x, weight, bias, approximate="tanh", backend=backend) + 0 * residual
        prenorm = kind == "prenorm"
        out = ops.dropout_add_layer_norm(x, residual, weight, bias, dropout_p=0.2, prenorm=prenorm, backend=backend)
        return out[0] + out[1] if prenorm else out

    assert_same_math(*on_both(function), [x, residual, weight, bias], ("x", "residual", "weight", "bias"), SWEEP_SLACK)


@settings(max_examples=40, **SWEEP)
@given(rows=st.integers(1, 70), columns=st.integers(1, 700), tanh=st.booleans(), dtype=dtypes, seed=seeds)
def test_bias_gelu_and_dropout(rows, columns, tanh, dtype, seed):
    torch.manual_seed(seed)

    def function(backend, x, bias):
        out = ops.bias_gelu(x, bias, approximate="tanh" if tanh else "none", backend=backend)
        return ops.dropout(out, dropout_p=0.4, residual=x, backend=backend)

    inputs = [(2 * torch.randn(rows, columns)).to(dtype), torch.randn(columns).to(dtype)]
    assert_same_math(*on_both(function), inputs, ("x", "bias"), SWEEP_SLACK)


# Few elements make stock right by luck, which no budget derived from its error can allow for: at least 4 x 20.
@settings(max_examples=40, **SWEEP)
@given(
    rows=st.integers(4, 9),
    classes=st.integers(20, 5000),
    smoothing=st.sampled_from([0.0, 0.3]),
    weighted=st.booleans(),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    dtype=dtypes,
    seed=seeds,
)
def test_cross_entropy(rows, classes, smoothing, weighted, reduction, dtype, seed):
    torch.manual_seed(seed)
    target = torch.randint(0, classes, (rows,))
    target[1] = -100
    weight = torch.rand(classes) + 0.1 if weighted else None
    options = {"label_smoothing": smoothing, "reduction": reduction}
    assert_same_math(
        lambda x: ops.cross_entropy(x, target, weight=weight, backend="cuda", **options),
        lambda x: F.cross_entropy(x, target, weight=None if weight is None else weight.to(x.dtype), **options),
        [(3 * torch.randn(rows, classes)).to(dtype)],
        ["logits"],
        SWEEP_SLACK,
    )
