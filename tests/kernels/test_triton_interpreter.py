"""Tests of the tester: the interpreter's bfloat16 equals torch's, and seeded bugs are found."""

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from interpreter.memory import traffic
from triton.runtime.errors import InterpreterError


@triton.jit
def _arithmetic(x, y, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b = tl.load(x + at), tl.load(y + at)
    c = a * b + a - b
    tl.store(out + at, tl.where(c > a, c, -b))


def test_bf16_arithmetic_is_torchs():
    x, y = torch.randn(256).bfloat16(), torch.randn(256).bfloat16()
    out = torch.empty_like(x)
    _arithmetic[(1,)](x, y, out, 256)
    c = x * y + x - y
    assert torch.equal(out, torch.where(c > x, c, -y))


@triton.jit
def _matmul(a, b, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tile = at[:, None] * SIZE + at[None, :]
    tl.store(out + tile, tl.dot(tl.load(a + tile), tl.load(b + tile)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_multiplies_values_not_bits(dtype):
    a, b = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype)
    out = torch.empty(32, 32)
    _matmul[(1,)](a, b, out, 32)
    exact = a.double() @ b.double()
    assert (out - exact).abs().max() < 32 * torch.finfo(torch.float32).eps * exact.abs().max()


@triton.jit
def _copy(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at))


def test_casts_to_bf16_round_to_nearest_even():
    x = torch.cat([torch.randn(251), torch.tensor([1.00390625, 1.01171875, float("inf"), -0.0, 3.4e38])])
    out = torch.empty(256, dtype=torch.bfloat16)
    _copy[(1,)](x, out, 256)
    assert torch.equal(out, x.bfloat16())


@triton.jit
def _reduce(x, out, SIZE: tl.constexpr):
    values = tl.load(x + tl.arange(0, SIZE))
    tl.store(out, tl.max(values, 0))
    tl.store(out + 1, tl.min(values, 0))


def test_bf16_reductions_compare_values_not_bits():
    x = torch.randn(64).bfloat16()
    out = torch.empty(2, dtype=torch.bfloat16)
    _reduce[(1,)](x, out, 64)
    assert torch.equal(out, torch.stack([x.max(), x.min()]))


@triton.jit
def _unmasked_tail(x, out, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at), mask=at < n)  # the bug: the load has no mask


def test_an_out_of_bounds_load_is_found():
    with pytest.raises(InterpreterError, match=r"_unmasked_tail: out-of-bounds load in program \(1, 0, 0\): 28 lanes"):
        _unmasked_tail[(2,)](torch.randn(100), torch.zeros(100), 100, 64)


@triton.jit
def _off_by_one(x, out, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at, mask=at < n), mask=at <= n)  # the bug: <= where < is meant


def test_an_out_of_bounds_store_is_found():
    with pytest.raises(InterpreterError, match="_off_by_one: out-of-bounds store .* 1 lanes"):
        _off_by_one[(1,)](torch.randn(100), torch.zeros(100), 100, 128)


@triton.jit
def _accumulate(out, ATOMIC: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    if ATOMIC:
        tl.atomic_add(out + at, tl.full([SIZE], 1.0, tl.float32))
    else:
        tl.store(out + at, tl.load(out + at) + 1.0)  # the bug: every program adds to the same addresses


def test_a_race_between_programs_is_found():
    with pytest.raises(InterpreterError, match="_accumulate: race in program"):
        _accumulate[(4,)](torch.zeros(16), False, 16)
    out = torch.zeros(16)
    _accumulate[(4,)](out, True, 16)
    assert (out == 4).all()


@triton.jit
def _scatter(out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at // 2, at)


def test_a_race_inside_one_store_is_found():
    with pytest.raises(InterpreterError, match="writes an address twice"):
        _scatter[(1,)](torch.zeros(16, dtype=torch.int32), 16)


def test_traffic_counts_unmasked_bytes():
    x, out = torch.randn(256), torch.empty(256, dtype=torch.bfloat16)
    with traffic() as bytes_moved:
        _copy[(1,)](x, out, 256)
    assert bytes_moved == {("_copy", "load"): 1024, ("_copy", "store"): 512}


def test_another_version_of_triton_is_refused():
    with pytest.raises(RuntimeError, match=r"Triton 3\.10\.0 is installed; .* checked with 3\.9\.0"):
        interpreter.check_version("3.10.0")
