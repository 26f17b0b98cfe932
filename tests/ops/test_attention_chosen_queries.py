"""ops.attention with queries of some positions only: each row is what it would be among all, forward and backward."""

import pytest
import torch
from fused import FUSED, either, needs_fused, reference_only
from oracle import DTYPES, assert_same_math

from fasttune import ops
from fasttune.ops._attention_call import Call
from fasttune.ops.attention import _attention

NAMES = ["query", "key", "value"]

# Lengths beside the positions chosen of each: none at all, the first (what a classifier reads), the last, every one,
# a run (the answer after a prompt), scattered over several blocks of 64 and both segments of 512 keys.
CASES = {
    "first rows": ([5, 1, 70], [[0], [0], [0]]),
    "last rows": ([130, 7], [[129], [6]]),
    "none, one, all": ([9, 66, 3], [[], [40], [0, 1, 2]]),
    "empty sequences": ([0, 4, 0], [[], [1, 3], []]),
    "an answer": ([200, 90], [list(range(101, 200)), list(range(45, 90))]),
    "scattered": ([700, 3], [list(range(3, 700, 7)), [1]]),
    "nothing": ([6, 2], [[], []]),
    "some twice": ([9, 80], [[3, 3, 8], [0, 0, *range(2, 70), 70, 70, 70]]),
}


def layout(lengths, positions):
    """(cu_seqlens, cu_seqlens_q, positions_q, flat rows of the chosen queries)."""
    cu, cu_q = [0], [0]
    for length, chosen in zip(lengths, positions, strict=True):
        cu.append(cu[-1] + length)
        cu_q.append(cu_q[-1] + len(chosen))
    flat = [start + at for start, chosen in zip(cu, positions, strict=False) for at in chosen]
    every = [at for chosen in positions for at in chosen]
    as_int32 = (torch.tensor(cu, dtype=torch.int32), torch.tensor(cu_q, dtype=torch.int32))
    return (*as_int32, torch.tensor(every, dtype=torch.int32), torch.tensor(flat, dtype=torch.int64))


def tensors(lengths, heads=2, head_dim=64, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(sum(lengths), heads, head_dim).to(dtype) for _ in range(3)]


def chosen(case, backend=FUSED, **options):
    cu, cu_q, positions, flat = layout(*CASES[case])

    def function(query, key, value):
        torch.manual_seed(3)
        rest = {"cu_seqlens": cu, "cu_seqlens_q": cu_q, "positions_q": positions, "backend": backend, **options}
        return ops.attention(query.index_select(0, flat), key, value, **rest)

    return function


def among_all(case, backend=FUSED, **options):
    cu, _, _, flat = layout(*CASES[case])

    def function(query, key, value):
        torch.manual_seed(3)
        return ops.attention(query, key, value, cu_seqlens=cu, backend=backend, **options).index_select(0, flat)

    return function


def run(function, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    torch.manual_seed(7)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.randn_like(out))]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dropout_p", either([0.0, 0.3], [0.3]))
@pytest.mark.parametrize("causal", [False, True])
def test_rows_have_the_bits_that_they_have_among_all(isa, case, causal, dropout_p):
    """Keys and values sum over other blocks of queries: their gradients may differ in the last bits. In Triton's
    interpreter the other ones too: numpy's product of a row depends on where in the tile it lies."""
    inputs = tensors(CASES[case][0])
    options = {"causal": causal, "dropout_p": dropout_p}
    ours, all_rows = (run(function(case, **options), inputs) for function in (chosen, among_all))
    exact = either(1 if case == "some twice" else 2, 0)  # a query's gradient is a sum over those at its position
    assert all(map(torch.equal, ours[:exact], all_rows[:exact]))
    for of_few, of_all in zip(ours[exact:], all_rows[exact:], strict=True):
        assert torch.allclose(of_few, of_all, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", either([16, 40, 128], [40]))
@pytest.mark.parametrize("causal", [False, True])
def test_is_as_exact_as_among_all(isa, dtype, head_dim, causal):
    """The truth is the reference's, in float64; the yardstick the kernel for all rows, which other tests hold to
    stock's accuracy. A reference of few rows is none: its error is small by luck now and then."""

    def yardstick(query, key, value):
        return among_all(case, "torch" if query.dtype == torch.float64 else FUSED, **options)(query, key, value)

    for case in either(("an answer", "scattered"), ("an answer",)):
        inputs = tensors(CASES[case][0], head_dim=head_dim, dtype=dtype)
        options = {"causal": causal, "dropout_p": 0.2}
        assert_same_math(chosen(case, **options), yardstick, inputs, NAMES)


@reference_only
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("causal", [False, True])
def test_reference_takes_rows_of_the_whole(case, causal):
    inputs = [x.double() for x in tensors(CASES[case][0], head_dim=16)]
    options = {"causal": causal, "dropout_p": 0.3, "backend": "torch"}
    for ours, all_rows in zip(
        run(chosen(case, **options), inputs), run(among_all(case, **options), inputs), strict=True
    ):
        assert torch.allclose(ours, all_rows, rtol=1e-12, atol=1e-12)


@needs_fused
def test_opcheck():
    cu, cu_q, positions, flat = layout(*CASES["none, one, all"])
    query, key, value = (x.requires_grad_() for x in tensors(CASES["none, one, all"][0], head_dim=16))
    rows = query.detach().index_select(0, flat).requires_grad_()
    seed = torch.tensor([5])
    args = (rows, key, value, *Call(cu, cu_q, positions, None, seed, True, 0.25, 0.1), FUSED)
    torch.library.opcheck(_attention._operator, args)


def test_bad_input_is_named():
    cu, cu_q, positions, flat = layout(*CASES["none, one, all"])
    query, key, value = tensors(CASES["none, one, all"][0])
    rows = query.index_select(0, flat)

    def call(rows=rows, **changes):
        options = {"cu_seqlens": cu, "cu_seqlens_q": cu_q, "positions_q": positions, **changes}
        return ops.attention(rows, key, value, **options)

    with pytest.raises(ValueError, match=r"expected both, with cu_seqlens"):
        call(cu_seqlens_q=None)
    with pytest.raises(ValueError, match=r"cu_seqlens_q runs from 0 to 5; expected 0 to 4, the rows of query"):
        call(cu_seqlens_q=torch.tensor([0, 0, 1, 5]))
    with pytest.raises(ValueError, match=r"positions_q is -1073741825 at row 0; expected a position counted from the"):
        call(positions_q=torch.tensor([-(2**30) - 1, 0, 1, 2]))
    with pytest.raises(ValueError, match=r"positions_q is 2147483648 at row 0; expected"):
        call(positions_q=torch.tensor([2**31, 0, 1, 2]))
    with pytest.raises(ValueError, match=r"positions_q goes from 1 to 0 at row 3; expected positions that never"):
        call(positions_q=torch.tensor([40, 0, 1, 0]))
    with pytest.raises(ValueError, match=r"positions_q is .*one per query"):
        call(positions_q=positions[:2])
    with pytest.raises(TypeError, match=r"positions_q is .*expected int32 or int64"):
        call(positions_q=positions.float())
