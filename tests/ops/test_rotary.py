"""ops.rotary against the composition of Transformers' apply_rotary_pos_emb, with tables whose halves differ."""

import hypothesis.strategies as st
import pytest
import torch
from fused import BACKENDS, FUSED, INTERPRETED, cpp_only, either, reference_only
from hypothesis import given, settings
from oracle import DTYPES, assert_same_math, run

from fasttune import ops


def make_tables(positions, width, dtype=torch.float32):
    """Not of angles: a kernel that took one half of a row for the other would be seen. Exact in every dtype."""
    return [torch.randn(positions, width).bfloat16().to(dtype) for _ in range(2)]


def rotate_half(x):
    low, high = x.chunk(2, -1)
    return torch.cat((-high, low), -1)


def stock(tables, ids=None, rotated=None):
    """For x (T, H, D) or (B, S, H, D), or with parts. ids: (T,) or (S,)."""

    def function(x):
        if rotated is not None:
            turned = function_of(x[..., :rotated, :, :], 2)
            return torch.cat((turned, x[..., rotated:, :, :]), -3)
        return function_of(x, 1)

    def function_of(x, between):
        cos, sin = (table if ids is None else table[ids.long()] for table in tables)
        lead = x.shape[: x.dim() - between - 1]
        lead = lead if cos.shape[0] == lead.numel() else lead[-1:]
        width = cos.shape[-1]
        cos, sin = (table.view(*lead, *[1] * between, width).to(x.dtype) for table in (cos, sin))
        part, rest = x[..., :width], x[..., width:]
        return torch.cat((part * cos + rotate_half(part) * sin, rest), -1)

    return function


def fused(tables, ids=None, rotated=None, backend=FUSED):
    return lambda x: ops.rotary(x, *tables, row_ids=ids, rotated=rotated, backend=backend)


# Head dimension and width: halves of whole vectors (4, 8, 16 lanes) and of one lane less or more, a part of the head as
# GPT-NeoX turns it, an odd rest, and the smallest.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "width"), [(64, 64), (64, 16), (37, 22), (66, 66), (80, 62), (2, 2), (3, 2)])
def test_query_and_key_of_a_projection_match_stock(isa, dtype, head_dim, width):
    tables = make_tables(7, width)
    x = torch.randn(7, 3, 5, head_dim).to(dtype)
    assert_same_math(fused(tables, rotated=2), stock(tables, rotated=2), [x], ["x"])


# name -> (x of a tensor, the tensor's shape, parts that are turned)
LAYOUTS = {
    "rows": (lambda x: x, (6, 5, 20), None),
    "sequences": (lambda x: x, (2, 3, 5, 20), None),
    "projection": (lambda x: x, (6, 3, 5, 20), 1),
    "all of a projection": (lambda x: x, (6, 3, 5, 20), 3),
    "sequences of projections": (lambda x: x, (2, 3, 3, 5, 20), 2),
    "heads before rows": (lambda x: x.transpose(1, 2), (2, 5, 3, 20), None),
    "heads before parts": (lambda x: x.view(6, 5, 3, 20).transpose(1, 2), (6, 5, 60), 2),
    "keys of a projection": (lambda x: x[:, 1], (6, 3, 5, 20), None),
    "some sequences, every other row": (lambda x: x[1:, ::2], (3, 6, 5, 20), None),
    "odd offset": (lambda x: x[..., 3:23], (6, 5, 29), None),
    "columns apart": (lambda x: x.mT, (6, 20, 5), None),
    "one for all rows": (lambda x: x.expand(6, 5, 20), (1, 5, 20), None),
    "one head": (lambda x: x, (6, 1, 20), None),
    "one head for all": (lambda x: x.expand(6, 5, 20), (6, 1, 20), None),
}


@pytest.mark.parametrize("dtype", either(DTYPES, (torch.bfloat16,)))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, layout, dtype):
    view, shape, rotated = LAYOUTS[layout]
    x, tables = torch.randn(shape).to(dtype), make_tables(6, 12)
    sides = [function(tables, rotated=rotated) for function in (fused, stock)]
    assert_same_math(*(lambda x, f=f: f(view(x)) for f in sides), [x], ["x"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_with_strides(isa, dtype):
    """What comes from an attention that wants the heads first."""
    tables, x = make_tables(12, 16), torch.randn(3, 4, 5, 16).to(dtype)
    sides = [function(tables) for function in (fused, stock)]
    assert_same_math(*(lambda x, f=f: f(x).transpose(1, 2).clone() for f in sides), [x], ["x"])
    assert_same_math(*(lambda x, f=f: f(x).mT for f in sides), [x], ["x"])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_chosen_rows(isa, dtype):
    """Packed rows: positions that begin anew, repeat and skip, the first and the last of the tables among them."""
    tables, ids = make_tables(40, 12), torch.tensor([0, 1, 2, 0, 39, 5, 5, 38], dtype=dtype)
    x = torch.randn(8, 3, 2, 12)
    assert_same_math(fused(tables, ids, 2), stock(tables, ids, 2), [x], ["x"])
    dense = torch.randn(2, 4, 2, 12)
    assert_same_math(fused(tables, ids), stock(tables, ids), [dense], ["x"])
    apart = torch.stack((ids, ids * 0), 1)[:, 0]
    assert torch.equal(fused(tables, apart)(dense), fused(tables, ids)(dense))


def test_sequences_share_the_tables_of_their_places(isa):
    tables, x = make_tables(4, 12), torch.randn(3, 4, 2, 12)
    assert_same_math(fused(tables), stock(tables), [x], ["x"])
    repeated = [table.repeat(3, 1) for table in tables]
    assert torch.equal(fused(tables)(x), fused(repeated)(x))
    projection = torch.randn(3, 4, 3, 2, 12)
    assert_same_math(fused(tables, rotated=2), stock(tables, rotated=2), [projection], ["x"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_once(dtype, backend):
    """Each element is off by half a unit in its last place and what float32 loses in two products and a sum: nearer
    than stock, which rounds each product to its dtype."""
    tables, x = make_tables(9, 32), torch.randn(9, 4, 40).to(dtype)
    dout = torch.randn(x.shape).to(dtype)
    ours = run(fused(tables, backend=backend), [x], dout)
    theirs = run(stock(tables), [x], dout)
    exact = run(stock([table.double() for table in tables]), [x.double()], dout.double())
    info, largest = torch.finfo(dtype), sum(table.abs().max() for table in tables)
    for mine, stocks, true, of in zip(ours, theirs, exact, (x, dout), strict=True):
        products = 2 * 2.0**-24 * largest * of.abs().max()
        bound = info.eps / 2 * true.abs() + info.smallest_normal * info.eps + products
        assert ((mine - true).abs() <= bound).all()
        share = ((mine - true).abs().sum() / (stocks - true).abs().sum()).item()
        assert share <= (1 if dtype == torch.float32 else 0.75), f"{share:.2f} of stock's error"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_in_either_dtype(isa, dtype):
    """Of float32 every bit counts; of x's own dtype the products are the same."""
    tables, x = make_tables(5, 18), torch.randn(5, 3, 20).to(dtype)
    ours = [fused([table.to(kind) for table in tables])(x) for kind in (torch.float32, dtype)]
    assert torch.equal(*ours)
    fine = [torch.randn(5, 18) for _ in range(2)]
    exact = stock([table.double() for table in fine])(x.double())
    assert ((fused(fine)(x) - exact).abs() <= 1.01 * torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5).all()


@settings(max_examples=either(60, 8), deadline=None)
@given(
    rows=st.integers(0, 9),
    parts=st.integers(1, 4),
    heads=st.integers(0, 9),
    half=st.integers(1, 45),
    rest=st.integers(0, 20),
    data=st.data(),
)
def test_any_shape(rows, parts, heads, half, rest, data):
    rotated = data.draw(st.integers(1, parts))
    tables, x = make_tables(11, 2 * half), torch.randn(rows, parts, heads, 2 * half + rest)
    ids = torch.randint(11, (rows,))
    assert_same_math(fused(tables, ids, rotated), stock(tables, ids, rotated), [x], ["x"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_turn(backend):
    for shape, ids in (((0, 2, 8), torch.arange(0)), ((3, 0, 8), None), ((0, 3, 2, 8), None), ((2, 0, 2, 8), None)):
        tables = make_tables(0 if ids is None and 0 in shape[:2] and shape != (3, 0, 8) else 3, 8)
        x = torch.randn(shape, requires_grad=True)
        out = ops.rotary(x, *tables, row_ids=ids, backend=backend)
        (dx,) = torch.autograd.grad(out.sum(), x)
        assert out.shape == dx.shape == shape


def test_backward_needs_neither_input_nor_output():
    tables, leaf = make_tables(5, 8), torch.randn(5, 3, 2, 8, requires_grad=True)
    x = leaf * 1
    out = fused(tables, rotated=2)(x)
    result = out.detach().clone()
    x.mul_(0)
    assert torch.equal(out, result)  # it is no view of x
    (dx,) = torch.autograd.grad(out.mul_(2).sum(), leaf)
    expected = run(fused(tables, rotated=2), [leaf], torch.full(leaf.shape, 2.0))[1]
    assert torch.equal(dx, expected)


def test_under_autocast_the_dtype_stays():
    tables, x = make_tables(5, 8), torch.randn(5, 2, 8, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            out = fused(tables)(x.to(dtype))
        assert out.dtype == dtype
        out.sum().backward()
        assert torch.equal(out, fused(tables)(x.to(dtype)))


@cpp_only
def test_bits_do_not_depend_on_threads():
    tables, x = make_tables(500, 64), torch.randn(500, 3, 4, 64)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(fused(tables, rotated=2)(x))
    assert torch.equal(*results)


def test_opcheck(isa):
    cos, sin = make_tables(4, 8)
    operator = torch.ops.fasttune.rotary.default
    for arguments in (
        (torch.randn(4, 3, 2, 8, requires_grad=True), cos, sin, torch.tensor([3, 0, 1, 1]), 2, False, FUSED),
        (torch.randn(2, 2, 4, 8).transpose(1, 2), cos, sin, None, None, True, FUSED),
    ):
        torch.library.opcheck(operator, arguments)


def test_compiles_as_one_graph_for_any_number_of_rows():
    compiled = torch.compile(
        lambda x, cos, sin: ops.rotary(x, cos, sin, rotated=2), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for rows in (5, 7):
        tables, x = make_tables(rows, 8), torch.randn(rows, 3, 2, 10)
        ours = run(lambda x, tables=tables: compiled(x, *tables), [x], torch.ones_like(x))
        eager = run(fused(tables, rotated=2), [x], torch.ones_like(x))
        assert all(map(torch.equal, ours, eager))


@reference_only
def test_gradcheck_of_the_reference():
    tables = [torch.randn(3, 4, dtype=torch.float64) for _ in range(2)]
    x = torch.randn(3, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fused(tables, rotated=2, backend="torch"), [x])


def test_the_second_derivative_is_that_of_a_linear_map():
    tables, x = make_tables(4, 8), torch.randn(4, 2, 8, requires_grad=True)
    dout, direction = torch.randn(4, 2, 8, requires_grad=True), torch.randn(4, 2, 8)
    (dx,) = torch.autograd.grad(fused(tables)(x), x, dout, create_graph=True)
    (again,) = torch.autograd.grad(dx, dout, direction)
    assert torch.equal(again, fused(tables)(direction))


def test_an_id_out_of_range():
    tables, x = make_tables(5, 4), torch.randn(3, 2, 6, requires_grad=True)
    for wrong in (5, -1, 2**40):
        ids = torch.tensor([0, wrong, 4])
        if not INTERPRETED:
            with pytest.raises(IndexError, match=rf"row_ids at position 1 is {wrong}; expected a value from 0 to 4"):
                ops.rotary(x, *tables, row_ids=ids)
            continue
        out = ops.rotary(x, *tables, row_ids=ids)  # as on a GPU, whose tensors are not read back
        (dx,) = torch.autograd.grad(out.sum(), x)
        for result in (out, dx):
            assert result.isnan().all(1).tolist() == [[False] * 6, [True] * 4 + [False] * 2, [False] * 6]


def test_tables_without_a_row():
    tables, x, ids = make_tables(0, 4), torch.randn(3, 2, 6), torch.arange(3)
    if INTERPRETED:
        assert ops.rotary(x, *tables, row_ids=ids).isnan()[..., :4].all()
    else:
        with pytest.raises(IndexError, match="row_ids at position 0 is 0; expected none, as there is nothing"):
            ops.rotary(x, *tables, row_ids=ids)


BAD = [
    (lambda x, t: ops.rotary(x.long(), *t), TypeError, "x is int64"),
    (lambda x, t: ops.rotary(x[0, 0], *t), ValueError, r"x is float32 of shape \(8,\).*expected \(T, H, D\)"),
    (lambda x, t: ops.rotary(x, *t, rotated=1), ValueError, r"x is .*expected \(T, N, H, D\).*as rotated is 1"),
    (lambda x, t: ops.rotary(x[None], *t, rotated=4), ValueError, "rotated is 4; expected a number from 1 to 3"),
    (lambda x, t: ops.rotary(x[None], *t, rotated=0), ValueError, "rotated is 0; expected a number from 1 to 3"),
    (lambda x, t: ops.rotary(x, t[0][:, :5], t[1]), ValueError, r"cos is .*\(3, 5\).*W even, from 2 to 8"),
    (lambda x, t: ops.rotary(x[..., :6], *t), ValueError, r"cos is .*\(3, 8\).*W even, from 2 to 6"),
    (lambda x, t: ops.rotary(x, t[0][:, :0], t[1]), ValueError, r"cos is .*\(3, 0\)"),
    (lambda x, t: ops.rotary(x, t[0][None], t[1]), ValueError, r"cos is .*\(1, 3, 8\).*expected \(P, W\)"),
    (lambda x, t: ops.rotary(x, t[0], t[1][:2]), ValueError, r"sin is .*\(2, 8\).*expected shape \(3, 8\)"),
    (lambda x, t: ops.rotary(x, t[0], t[1].half()), TypeError, "sin is float16.*expected both in torch.float32"),
    (lambda x, t: ops.rotary(x, *[y.half() for y in t]), TypeError, "cos is float16.*expected both in torch.float32"),
    (lambda x, t: ops.rotary(x, *[y[:2] for y in t]), ValueError, r"cos is .*\(2, 8\).*expected 3 rows of cos"),
    (lambda x, t: ops.rotary(x[None], *[y[:1] for y in t]), ValueError, "expected 3 rows of cos"),
    (lambda x, t: ops.rotary(torch.stack((x, x)), *[y[:2] for y in t]), ValueError, "expected 6 or 3 rows of cos"),
    (lambda x, t: ops.rotary(x, t[0].requires_grad_(), t[1]), ValueError, r"cos requires.*expected cos\.detach"),
    (lambda x, t: ops.rotary(x, *t, row_ids=torch.arange(2)), ValueError, r"row_ids is .*expected shape \(3,\)"),
    (lambda x, t: ops.rotary(x, *t, row_ids=torch.zeros(3)), TypeError, "row_ids is float32"),
    (lambda x, t: ops.rotary(x, *t, backend="gpu"), ValueError, "backend='gpu' is unknown"),
    (lambda x, t: ops.rotary(x.double(), *t, backend=FUSED), RuntimeError, f"'{FUSED}' was asked.*float64"),
    (lambda x, t: ops.rotary(x.to("meta"), *t), ValueError, "cos is .* on cpu; expected it on meta like x"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input_is_named(call, kind, message):
    with pytest.raises(kind, match=f"(?s){message}"):
        call(torch.randn(3, 3, 8), make_tables(3, 8))


def test_tables_that_require_a_gradient_pass_where_none_is_recorded():
    tables = [table.requires_grad_() for table in make_tables(3, 8)]
    with torch.no_grad():
        ops.rotary(torch.randn(3, 2, 8), *tables)
