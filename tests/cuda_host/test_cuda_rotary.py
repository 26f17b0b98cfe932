"""The CUDA rotary kernel, run on the host: values against float64, layouts, chosen rows, ids out of range."""

import pytest
import torch
from oracle import DTYPES, assert_same_math

from fasttune import ops


def make_tables(positions, width, dtype=torch.float32):
    """Not of angles, so that one half is not the other; exact in every dtype."""
    return [torch.randn(positions, width).bfloat16().to(dtype) for _ in range(2)]


def on(backend, tables, **options):
    return lambda x: ops.rotary(x, *tables, backend=backend, **options)


def check(rows, heads, head_dim, width, dtype, table_dtype=torch.float32):
    """Against the composition, with chosen rows and a value that is copied."""
    tables, ids = make_tables(rows + 2, width, table_dtype), torch.randint(rows + 2, (rows,))
    x = torch.randn(rows, 3, heads, head_dim).to(dtype)
    stock = lambda x: composed(x, *(table.to(x.dtype)[ids][:, None, None] for table in tables))  # noqa: E731
    assert_same_math(on("cuda", tables, row_ids=ids, rotated=2), stock, [x], ["x"])


def composed(x, cos, sin):
    width = cos.shape[-1]
    part, rest = x[:, :2, :, :width], x[:, :2, :, width:]
    low, high = part.chunk(2, -1)
    part = part * cos + torch.cat((-high, low), -1) * sin
    return torch.cat((torch.cat((part, rest), -1), x[:, 2:]), 1)


# Heads of whole 16-byte vectors, a quarter that is turned, neither whole; one head and many rows in a block; more heads
# than a block walks side by side; a head wider than a block has threads.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "heads", "head_dim", "width"),
    [(7, 4, 64, 64), (7, 4, 64, 16), (6, 3, 37, 22), (300, 1, 2, 2), (5, 11, 16, 16), (2, 1, 2200, 2100)],
)
def test_matches_stock(rows, heads, head_dim, width, dtype):
    check(rows, heads, head_dim, width, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_in_the_dtype_of_x(dtype):
    check(5, 3, 32, 16, dtype, dtype)


# An offset or a stride that is no whole vector goes element by element.
VIEWS = {
    "sequences": ((2, 5, 3, 16), lambda x: x),
    "keys": ((10, 3, 3, 16), lambda x: x[:, 1]),
    "heads before rows": ((2, 3, 5, 16), lambda x: x.transpose(1, 2)),
    "offset": ((10, 3, 19), lambda x: x[..., 3:]),
    "columns apart": ((10, 16, 3), lambda x: x.mT),
    "one for all": ((1, 3, 16), lambda x: x.expand(10, 3, 16)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_layouts_have_the_bits_of_a_copy(view):
    shape, function = VIEWS[view]
    x, rows = torch.randn(shape).bfloat16(), 10 if len(shape) == 3 or view == "keys" else 5
    tables = make_tables(rows, 8)
    turned = on("cuda", tables)(function(x))
    assert torch.equal(turned, on("cuda", tables)(function(x).clone(memory_format=torch.contiguous_format)))
    assert_same_math(lambda x: on("cuda", tables)(function(x)), lambda x: on("torch", tables)(function(x)), [x], ["x"])


def test_an_id_out_of_range_reads_nothing():
    x = torch.randn(4, 2, 6, requires_grad=True)
    out = ops.rotary(x, *make_tables(5, 4), row_ids=torch.tensor([0, 5, -1, 4]), backend="cuda")
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    for result in (out, dx):
        assert result.isnan().all(1).tolist() == [[False] * 6, *[[True] * 4 + [False] * 2] * 2, [False] * 6]


def test_nothing_to_turn():
    for shape in ((0, 2, 8), (3, 0, 8)):
        x = torch.randn(shape, requires_grad=True)
        out = ops.rotary(x, *make_tables(shape[0], 8), backend="cuda")
        (dx,) = torch.autograd.grad(out.sum(), x)
        assert out.shape == dx.shape == shape
