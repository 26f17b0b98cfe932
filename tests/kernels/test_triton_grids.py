"""No launch has more than 65535 blocks in its grid's second or third dimension: CUDA's grids end there. The
launches are recorded, not run."""

import importlib
import pkgutil

import pytest
import torch
from fused import triton_only

import fasttune.kernels
from fasttune import ops
from fasttune.kernels import attention

pytestmark = triton_only
LIMIT, ROWS, MANY = 65535, 32 * 65535 + 1, 65536


class Recorder:
    def __init__(self, name, grids):
        self.name, self.grids = name, grids

    def __getitem__(self, grid):
        return lambda *args, **options: self.grids.append((self.name, grid))


@pytest.fixture
def grids(monkeypatch):
    monkeypatch.setenv("FASTTUNE_BACKEND", "triton")
    recorded = []
    for found in pkgutil.iter_modules(fasttune.kernels.__path__):
        module = importlib.import_module(f"fasttune.kernels.{found.name}")
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(name, recorded))
    return recorded


def zeros(*shape):
    return torch.zeros(1).expand(shape).requires_grad_()  # an address for each, and no memory


def labels(rows):
    return torch.zeros(rows, dtype=torch.int64)


def offsets(sequences):
    return torch.arange(sequences + 1, dtype=torch.int32)


CASES = {
    "attention of many sequences": lambda: ops.attention(*[zeros(MANY, 1, 1, 16)] * 3),
    "attention of many heads": lambda: ops.attention(*[zeros(1, 1, MANY, 16)] * 3),
    "packed attention": lambda: ops.attention(*[zeros(MANY, 1, 16)] * 3, cu_seqlens=offsets(MANY)),
    "bias_gelu": lambda: ops.bias_gelu(zeros(ROWS, 2), None),
    "gated_activation": lambda: ops.gated_activation(zeros(ROWS, 2)),
    "layer_norm": lambda: ops.layer_norm(zeros(ROWS, 2), None, None),
    "dropout_add_layer_norm": lambda: ops.dropout_add_layer_norm(zeros(ROWS, 2), zeros(ROWS, 2), None, None),
    "dropout": lambda: ops.dropout(zeros(ROWS, 2)),
    "dropout of a vector": lambda: ops.dropout(zeros(1024 * MANY)),
    "cross_entropy": lambda: ops.cross_entropy(zeros(ROWS, 2), labels(ROWS)),
    "linear_max": lambda: ops.linear_max(zeros(2 * MANY, 1), zeros(3, 1), 2 * offsets(MANY)),
    "embedding": lambda: ops.embedding(labels(ROWS), zeros(5, 2)),
    "rotary": lambda: ops.rotary(zeros(ROWS, 1, 2), *[torch.zeros(1, 2)] * 2, row_ids=labels(ROWS)),
    "unpack": lambda: ops.unpack(*ops.pack(zeros(ROWS, 2, 1), torch.ones(ROWS, 2))),
}


@pytest.mark.parametrize("case", CASES)
def test_grids_are_long_in_the_first_dimension_alone(grids, case):
    out = CASES[case]()
    out.backward(torch.ones_like(out))
    assert grids
    assert all(max(grid[1:], default=1) <= LIMIT for _, grid in grids), grids


@pytest.mark.parametrize("blocks", [65535, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_every_program_has_its_sequence_head_and_tile(monkeypatch, packed, blocks):
    """Several of each, in one launch and in many: one that took another's would leave a hole, which is poisoned, or
    would drop other weights."""
    monkeypatch.setattr(attention, "LAUNCH_BLOCKS", blocks)
    shape = (3, 70, 5, 16) if not packed else (210, 5, 16)
    options = {"cu_seqlens": torch.tensor([0, 70, 71, 210])} if packed else {}
    inputs, upstream = [torch.randn(shape) for _ in range(3)], torch.randn(shape)

    def results(backend):
        torch.manual_seed(3)
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = ops.attention(*leaves, causal=True, dropout_p=0.3, backend=backend, **options)
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    for ours, reference in zip(results("triton"), results("torch"), strict=True):
        torch.testing.assert_close(ours, reference)
