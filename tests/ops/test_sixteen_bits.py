"""bfloat16 and float16 in memory: every value read, and every rounding written, bit for bit as torch converts.

The kernels compute in float32, so a wrong conversion hides in any tolerance that allows for 16 bits. Here nothing is
computed: a LayerNorm's residual sum is x + (-0) in float32, which is what was loaded; the gradient of x is dsum + 0,
which is what was to be stored. All operators share these loads and stores (csrc/cpu/simd/vec_*.inc).
"""

import pytest
import torch
from fused import FUSED, either, reference_only

from fasttune import ops

SIXTEEN = (torch.bfloat16, torch.float16)
# 128: whole vectors alone; 15: the ends of rows, of 15 lanes on AVX-512, 8 + 7 on AVX2 and 3 x 4 + 3 on the baseline;
# 3: ends alone.
COLUMNS = either((128, 15, 3), (128, 15))


def every_value(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def rows_of(values, columns):
    """The values in rows, zeros behind the last one."""
    return torch.nn.functional.pad(values, (0, -values.numel() % columns)).view(-1, columns)


def same_bits(actual, expected):
    """Equal bits, or NaN both: of a NaN only that it is one is promised."""
    kind = torch.int32 if actual.dtype == torch.float32 else torch.int16
    same = (actual.view(kind) == expected.view(kind)) | (actual.isnan() & expected.isnan())
    wrong = (~same).flatten().nonzero().flatten()[:5]
    return not wrong.numel(), [(expected.flatten()[i].item(), actual.flatten()[i].item()) for i in wrong]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_every_value_is_read_exactly(isa, dtype, columns):
    x = rows_of(every_value(dtype), columns)
    residual = torch.full(x.shape, -0.0)  # x + (-0) is x, whatever x is
    _, total = ops.dropout_add_layer_norm(x, residual, None, None, prenorm=True, backend=FUSED)
    assert total.dtype == torch.float32
    same, wrong = same_bits(total, x.float())
    assert same, f"(expected, read): {wrong}"


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_every_value_comes_back_from_a_round_trip(isa, dtype, columns):
    table = rows_of(every_value(dtype), columns)
    same, wrong = same_bits(ops.embedding(torch.arange(table.shape[0]), table, backend=FUSED), table)
    assert same, f"(expected, written): {wrong}"


def ties_of(dtype):
    """The float32 in the middle of every two neighbours of `dtype`, the last between the largest and infinity."""
    ordered = every_value(dtype).double()
    ordered = ordered[ordered.isfinite()].unique()
    beyond = 2 * ordered[-1:] - ordered[-2:-1]
    ordered = torch.cat((-beyond, ordered, beyond))
    return ((ordered[1:] + ordered[:-1]) / 2).float()


def roundings(dtype):
    """float32 values that decide how rounding goes: every tie and its two neighbours; every value of `dtype` itself;
    float32's smallest and largest; NaNs."""
    ties, inf = ties_of(dtype), torch.tensor(torch.inf)
    limits = torch.finfo(torch.float32)
    extremes = torch.tensor([limits.max, limits.tiny, 2.0**-149, 1e6])
    # NaNs: the usual one, the one that rounding up would carry over to -0, and one whose upper half alone is infinity.
    nans = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    near = (torch.nextafter(ties, inf), torch.nextafter(ties, -inf))
    return torch.cat((every_value(dtype).float(), ties, *near, extremes, -extremes, nans, -nans))


@reference_only
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_the_ties_are_ties(dtype):
    ties, inf = ties_of(dtype), torch.tensor(torch.inf)
    assert ties.numel() > 63_000
    above, below = (torch.nextafter(ties, towards).to(dtype) for towards in (inf, -inf))
    assert (above != below).all()
    assert ((ties.to(dtype).view(torch.int16) & 1) == 0).all()  # to even


@pytest.mark.parametrize("columns", either(COLUMNS, (128,)))
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_every_rounding_is_to_nearest_even(isa, dtype, columns):
    dsum = rows_of(roundings(dtype), columns)
    x = torch.zeros(dsum.shape, dtype=dtype, requires_grad=True)
    results = ops.dropout_add_layer_norm(x, torch.randn(dsum.shape), None, None, prenorm=True, backend=FUSED)
    # A gradient of the norm itself, be it 0: without one dsum would be handed on by torch.
    (dx,) = torch.autograd.grad(results, x, [torch.zeros(dsum.shape), dsum])
    assert dx.dtype == dtype
    same, wrong = same_bits(dx + 0.0, dsum.to(dtype) + 0.0)  # 0 + (-0) is 0
    assert same, f"(expected, written): {wrong}"
