"""The Triton rotary kernel: the bytes it moves, and several programs for every shape of its tiles."""

import pytest
import torch
from fused import FUSED
from interpreter.memory import traffic

from fasttune import ops


# Tables of float32 are a hundredth of a projection of 12 heads; read once for each head, they would be a third of it.
@pytest.mark.parametrize(("width", "chosen"), [(64, False), (16, True)])
def test_bytes_moved_are_the_minimum(moves_at_most, width, chosen):
    x = torch.randn(64, 3, 12, 64).bfloat16().requires_grad_()
    tables = [torch.randn(64, width) for _ in range(2)]
    ids = torch.arange(64).flip(0) if chosen else None
    least = 2 * x.nbytes + 2 * tables[0].nbytes + (ids.nbytes if chosen else 0)
    with traffic() as moved:
        out = ops.rotary(x, *tables, row_ids=ids, rotated=2, backend=FUSED)
    moves_at_most(f"rotary forward, {width} of 64", moved, least)
    with traffic() as moved:
        torch.autograd.grad(out, x, torch.ones_like(out))
    moves_at_most(f"rotary backward, {width} of 64", moved, least)


# One head and many rows in a program, more heads than a step takes, a row alone.
@pytest.mark.parametrize(("rows", "heads", "head_dim", "width"), [(70, 1, 32, 32), (37, 19, 24, 16), (1, 40, 16, 16)])
def test_every_program_has_its_rows_and_heads(rows, heads, head_dim, width):
    """The same bits as the reference, which the interpreter's arithmetic has: no fused multiply-adds."""
    x, tables = torch.randn(rows, 2, heads, head_dim), [torch.randn(rows, width) for _ in range(2)]
    for rotated in (1, 2):
        results = [ops.rotary(x, *tables, rotated=rotated, backend=backend) for backend in ("triton", "torch")]
        assert torch.equal(*results)
