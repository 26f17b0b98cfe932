"""ops.dropout against its specification (docs/dropout.md): vectors, masks on every instruction set, statistics."""

import hypothesis.strategies as st
import pytest
import torch
from fused import FUSED, either, needs_fused, reference_only
from hypothesis import example, given, settings
from oracle import DTYPES, assert_same_math
from scipy import stats

from fasttune import ops
from fasttune.ops._reference.philox import elementwise_keep_mask, keep_scale, philox4x32, threshold
from fasttune.ops.dropout import _dropout

# Known answers that Random123 publishes for philox4x32-10.
RANDOM123 = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@reference_only
@pytest.mark.parametrize(("counter", "key", "expected"), RANDOM123)
def test_philox_gives_random123s_answers(counter, key, expected):
    assert philox4x32(counter, key) == expected


@reference_only
def test_vectorised_mask_follows_the_scalar_specification():
    seed, p, columns = torch.tensor([-(2**62) + 12345]), 0.3, 300
    key = (seed.item() & 0xFFFFFFFF, (seed.item() >> 32) & 0xFFFFFFFF)
    rows = torch.tensor([0, 7, 2**35 + 1])
    mask = elementwise_keep_mask(rows, columns, seed, p)
    for i, row in enumerate(rows.tolist()):
        for column in range(columns):
            block, rest = divmod(column, 128)
            word, rest = divmod(rest, 32)
            half, lane = divmod(rest, 16)
            words = philox4x32((block * 16 + lane, row & 0xFFFFFFFF, row >> 32, 0), key)
            uniform = (words[word] >> (16 * half)) & 0xFFFF
            assert mask[i, column].item() == (uniform >= threshold(p))


@needs_fused
@settings(max_examples=either(40, 8), deadline=None)
@given(
    rows=st.integers(0, 5),
    columns=st.integers(0, 400),
    p=st.floats(0.001, 1.0),
    seed=st.integers(-(2**63), 2**63 - 1),
    first_row=st.integers(0, 2**40),
)
@example(rows=3, columns=300, p=0.5, seed=7, first_row=2**35 + 2**32 - 1)  # both words of a row's number matter
def test_mask_is_the_references_bit_for_bit(rows, columns, p, seed, first_row):
    seed_tensor, ids = torch.tensor([seed]), torch.arange(rows) + first_row
    out = _dropout(torch.ones(rows, columns), None, ids, seed_tensor, p, FUSED)
    expected = elementwise_keep_mask(ids, columns, seed_tensor, p) * torch.tensor(keep_scale(p))
    assert torch.equal(out, expected)


@needs_fused
def test_the_last_bit_of_every_uniform_counts():
    """Enough elements for each of a counter's eight uniforms to meet an odd threshold, which is kept."""
    shape, seed, p = (2048, 1024), torch.tensor([11]), 32769 / 65536
    out = _dropout(torch.ones(shape), None, None, seed, p, FUSED)
    assert torch.equal(out != 0, elementwise_keep_mask(torch.arange(shape[0]), shape[1], seed, p))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (2, 5, 128), (4, 131), (0, 5), (3, 0)])
def test_forward_and_backward_match_the_reference(isa, dtype, shape):
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)

    def run_on(backend):
        def function(x, residual):
            torch.manual_seed(1)
            return ops.dropout(x, dropout_p=0.25, residual=residual, backend=backend)

        return function

    assert_same_math(run_on(FUSED), run_on("torch"), [x, residual], ["x", "residual"])


def test_manual_seed_reproduces_and_calls_differ():
    x = torch.ones(64, 256)
    torch.manual_seed(5)
    first, second = ops.dropout(x, dropout_p=0.5), ops.dropout(x, dropout_p=0.5)
    torch.manual_seed(5)
    assert torch.equal(first, ops.dropout(x, dropout_p=0.5))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [1 / 65536, 0.1, 0.5, 0.9])
def test_keep_rate_is_the_stated_probability(p):
    torch.manual_seed(0)
    n = either(4_000_000, 1_000_000)
    dropped = (ops.dropout(torch.ones(n // 1000, 1000), dropout_p=p) == 0).sum().item()
    assert stats.binomtest(dropped, n, threshold(p) / 65536).pvalue > 1e-6
    assert abs(threshold(p) / 65536 - p) <= 2**-16


def test_rows_columns_and_calls_are_independent():
    torch.manual_seed(0)
    first = (ops.dropout(torch.ones(512, 1024), dropout_p=0.5) != 0).double()
    second = (ops.dropout(torch.ones(512, 1024), dropout_p=0.5) != 0).double()
    n = first.numel()
    pairs = {
        "neighbouring rows": (first[1:], first[:-1]),
        "neighbouring columns": (first[:, 1:], first[:, :-1]),
        "columns 16 apart (halves of one word)": (first[:, 16:], first[:, :-16]),
        "columns 32 apart (words of one counter)": (first[:, 32:], first[:, :-32]),
        "columns 128 apart (counters)": (first[:, 128:], first[:, :-128]),
        "two calls": (first, second),
    }
    for name, (a, b) in pairs.items():
        correlation = ((a - 0.5) * (b - 0.5)).mean().item() * 4
        assert abs(correlation) < 5 / n**0.5, f"{name}: correlation {correlation:.2g}"


def test_opcheck(isa):
    seed = torch.tensor([3])
    for x in (torch.randn(3, 70), torch.randn(3, 70, requires_grad=True)):
        torch.library.opcheck(
            torch.ops.fasttune.dropout.default, (x, torch.randn(3, 70), torch.arange(3), seed, 0.2, FUSED)
        )


def test_compiles_as_one_graph_and_keeps_its_mask():
    x = torch.randn(8, 96, requires_grad=True)
    compiled = torch.compile(lambda x: ops.dropout(x, dropout_p=0.4), fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    out = compiled(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad != 0, out != 0)


def test_bad_input_is_named():
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="dropout_p is 1.5; expected a probability"):
        ops.dropout(x, dropout_p=1.5)
    with pytest.raises(ValueError, match=r"residual is float32 of shape \(3,\) on cpu; expected shape \(2, 3\)"):
        ops.dropout(x, dropout_p=0.5, residual=torch.randn(3))
    with pytest.raises(TypeError, match="x is int64"):
        ops.dropout(torch.arange(3), dropout_p=0.5)
    with pytest.raises(ValueError, match="backend='gpu' is unknown"):
        ops.dropout(x, dropout_p=0.5, backend="gpu")
    with pytest.raises(RuntimeError, match=rf"'{FUSED}' was asked for dropout, but .*float64"):
        ops.dropout(x.double(), dropout_p=0.5, backend=FUSED)
