"""Odd arguments: torch's result where torch has one, else one sentence that names the argument."""

import pytest
import torch
import torch.nn.functional as F
from fused import BACKENDS
from sentences import assert_sentence

from fasttune import ops
from fasttune.ops.packing import gather_rows
from fasttune.ops.tied import tied_views

X, IDS, NONE = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64), torch.zeros(0, 8)
PACKED, OFFSETS = torch.randn(8, 2, 16), torch.tensor([0, 8])
BATCH = ops.PackedBatch.from_mask(torch.ones(1, 2))

REFUSED = {
    "residual": lambda: ops.dropout(X, residual=[1]),
    "row_ids": lambda: ops.dropout(X, row_ids=[0, 1]),
    "dropout_p": lambda: ops.dropout(X, dropout_p="a"),
    "eps": lambda: ops.layer_norm(X, None, None, eps=None),
    "weight": lambda: ops.layer_norm(X, [1.0] * 8, None),
    "approximate": lambda: ops.bias_gelu(X, None, approximate=["tanh"]),
    "activation": lambda: ops.bias_activation(X, None, activation=["relu"]),
    "b": lambda: ops.gated_activation(X, [1.0]),
    "backend": lambda: ops.bias_gelu(X, None, backend=["cpp"]),
    "query": lambda: ops.attention([1], PACKED, PACKED),
    "scale": lambda: ops.attention(*[PACKED[None]] * 3, scale="a"),
    "cu_seqlens": lambda: ops.attention(*[PACKED] * 3, cu_seqlens=[0, 8]),
    "max_seqlen": lambda: ops.attention(*[PACKED] * 3, cu_seqlens=OFFSETS, max_seqlen=8.5),
    "cu_seqlens_q": lambda: ops.attention(
        *[PACKED] * 3, cu_seqlens=OFFSETS, cu_seqlens_q=[0, 8], positions_q=torch.arange(8)
    ),
    "positions_q": lambda: ops.attention(*[PACKED] * 3, cu_seqlens=OFFSETS, cu_seqlens_q=OFFSETS, positions_q=[1] * 8),
    "x": lambda: ops.pack([1], torch.ones(1, 1)),
    "attention_mask": lambda: ops.pack(X, [1]),
    "position_ids": lambda: ops.PackedBatch.from_position_ids([1]),
    "packed": lambda: ops.unpack([1], BATCH),
    "batch": lambda: ops.unpack(X, [1]),
    "rows": lambda: gather_rows([1], IDS),
    "indices": lambda: gather_rows(X, [1]),
    "weight of tied_views": lambda: tied_views([1]),
    "logits": lambda: ops.cross_entropy(torch.tensor(1.0), torch.tensor(0)),
    "ignore_index": lambda: ops.cross_entropy(X, IDS, ignore_index=1.5),
    "ignore_index of linear_cross_entropy": lambda: ops.linear_cross_entropy(X, X, IDS, ignore_index=None),
    "label_smoothing": lambda: ops.cross_entropy(X, IDS, label_smoothing=None),
    "reduction": lambda: ops.cross_entropy(X, IDS, reduction=["mean"]),
    "normalizer": lambda: ops.linear_cross_entropy(X, X, IDS, normalizer=[1]),
    "linear_weight": lambda: ops.linear_cross_entropy(X, [1], IDS),
    "ids": lambda: ops.linear_log_prob(X, X, [0]),
    "scale of linear_log_prob": lambda: ops.linear_log_prob(X, X, IDS, scale=float("nan")),
    "linear_bias": lambda: ops.linear_log_prob(X, X, IDS, linear_bias=[1]),
    "linear_weight of linear_max": lambda: ops.linear_max(X, [1], OFFSETS),
    "cu_seqlens of linear_max": lambda: ops.linear_max(X, X, [0, 1]),
    "x of rotary": lambda: ops.rotary([1], X, X),
    "cos": lambda: ops.rotary(PACKED, [1], X),
    "sin": lambda: ops.rotary(PACKED, torch.randn(8, 16), [1]),
    "rotated": lambda: ops.rotary(PACKED[None], X, X, rotated=1.5),
    "row_ids of rotary": lambda: ops.rotary(PACKED, X, X, row_ids=[0] * 8),
    "input_ids": lambda: ops.embedding([0, 1], X),
    "word_weight": lambda: ops.embedding(IDS, [[1.0]]),
    "padding_idx": lambda: ops.embedding(IDS, X, padding_idx=1.5),
}


@pytest.mark.parametrize("argument", REFUSED)
def test_a_sentence_names_the_argument(argument):
    assert_sentence(REFUSED[argument], f"{argument.split()[0]} is ", "; expected ", kind=(TypeError, ValueError))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_of_a_number(backend):
    torch.manual_seed(0)
    x = torch.tensor(3.0, requires_grad=True)
    outs = torch.stack([ops.dropout(x, dropout_p=0.5, backend=backend) for _ in range(40)])
    assert set(outs.tolist()) == {0.0, 6.0}
    (slope,) = torch.autograd.grad(outs.sum(), x)
    assert slope == 2 * (outs != 0).sum()
    one = ops.dropout(x, residual=torch.tensor(1.0), dropout_p=1.0, backend=backend)
    assert (one.shape, one.item()) == ((), 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_classes(backend, reduction):
    """Rows can but be ignored."""
    for labels in (IDS[:0], IDS - 100):
        x = X[: labels.numel()]
        ours = ops.linear_cross_entropy(x, NONE, labels, reduction=reduction, backend=backend)
        stock = F.cross_entropy(F.linear(x, NONE), labels, reduction=reduction)
        torch.testing.assert_close(ours, stock, equal_nan=True)
        alone = ops.cross_entropy(x[:, :0], labels, reduction=reduction, backend=backend)
        torch.testing.assert_close(alone, stock, equal_nan=True)
    with pytest.raises(IndexError, match=r"target at position 0 is 0; expected none, as there is nothing"):
        ops.linear_cross_entropy(X, NONE, IDS, backend="torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_of_a_bias_alone(backend):
    bias = torch.randn(8)
    ours = ops.embedding(IDS, X, norm_bias=bias, backend=backend)
    torch.testing.assert_close(ours, F.layer_norm(X[IDS], (8,), None, bias, 1e-12))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_without_a_dimension_for_rows(backend):
    label = torch.tensor(1)
    torch.testing.assert_close(ops.cross_entropy(X[0], label, backend=backend), F.cross_entropy(X[0], label))
    linear = ops.linear_cross_entropy(X[0], X, label, backend=backend)
    torch.testing.assert_close(linear, F.cross_entropy(F.linear(X[0], X), label))
    assert torch.equal(ops.embedding(label, X, backend=backend), X[1])
