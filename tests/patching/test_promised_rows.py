"""PromisedRows: any use of one gives what the computed tensor would have given, and only the rows read are computed."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fasttune.patching.promises.loss import LinearRows
from fasttune.patching.promises.source import TensorRows
from fasttune.patching.promises.tensor import PromisedRows, materialized

BATCH, LENGTH, WIDTH, VOCABULARY = 2, 5, 4, 11


class Recorder(TensorRows):
    """Remembers how many rows were asked for."""

    def __init__(self, tensor):
        super().__init__(tensor)
        self.asked = []

    def rows(self, ids):
        self.asked.append(self.count if ids is None else ids.numel())
        return super().rows(ids)


def logits_of(source, head):
    return LinearRows(source, head.weight, head.bias, None, select=True, note=lambda: None)


@pytest.fixture
def setup():
    torch.manual_seed(0)
    hidden = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    head = nn.Linear(WIDTH, VOCABULARY)
    source = Recorder(hidden)
    lazy = PromisedRows.of(logits_of(source, head), (BATCH, LENGTH))
    return hidden, head, source, lazy, head(hidden)


PICKS = {
    "x[:, 0]": (lambda x: x[:, 0], BATCH),
    "x[:, -1, :]": (lambda x: x[:, -1, :], BATCH),
    "x[..., :-1, :]": (lambda x: x[..., :-1, :], BATCH * (LENGTH - 1)),
    "x[1]": (lambda x: x[1], LENGTH),
    "x[-1, 2]": (lambda x: x[-1, 2], 1),
    "x[arange, places]": (lambda x: x[torch.arange(BATCH), torch.tensor([3, 1])], BATCH),
    "repeated rows": (lambda x: x[torch.tensor([1, 1, 0])], BATCH * LENGTH),
    "a mask of rows": (lambda x: x[torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0]]).bool()], 3),
    "view(-1, V)": (lambda x: x.view(-1, VOCABULARY), BATCH * LENGTH),
    "view(N, -1)": (lambda x: x.view(BATCH * LENGTH, -1), BATCH * LENGTH),
    "reshape then pick": (lambda x: x.reshape(-1, VOCABULARY)[2:6].contiguous().float(), 4),
    "shift like a causal loss": (lambda x: x[..., :-1, :].contiguous().view(-1, VOCABULARY), BATCH * (LENGTH - 1)),
    "clone": (lambda x: x.clone()[0], LENGTH),
    "x[::2] steps": (lambda x: x[:, ::2], BATCH * 3),
    "a list of rows": (lambda x: x[[1, 0]], BATCH * LENGTH),
    "a new axis": (lambda x: x[1, None], LENGTH),
    "unsqueeze": (lambda x: x[:, 2].unsqueeze(1), BATCH),
    "index_select": (lambda x: x.index_select(1, torch.tensor([4, 0])), BATCH * 2),
    "gather of rows": (lambda x: x.gather(1, torch.tensor([3, 1]).view(2, 1, 1).expand(2, 1, VOCABULARY)), BATCH),
    "take_along_dim": (lambda x: torch.take_along_dim(x, torch.tensor([3, 1]).view(2, 1, 1), 1), BATCH),
    "narrow": (lambda x: x.narrow(1, 1, 2), BATCH * 2),
    "flatten": (lambda x: x[:, :2].flatten(0, 1), BATCH * 2),
}


@pytest.mark.parametrize("name", PICKS)
def test_picking_rows_stays_lazy_and_computes_just_those(setup, name):
    hidden, _, source, lazy, exact = setup
    pick, rows = PICKS[name]
    picked = pick(lazy)
    assert isinstance(picked, PromisedRows)
    assert picked.shape == pick(exact).shape
    assert source.asked == []
    value = materialized(picked)
    assert type(value) is torch.Tensor
    assert torch.allclose(value, pick(exact), rtol=1e-5, atol=1e-6)
    assert source.asked == [rows]
    upstream = torch.randn_like(value)
    ours, stock = torch.autograd.grad(value, hidden, upstream), torch.autograd.grad(pick(exact), hidden, upstream)
    assert torch.allclose(ours[0], stock[0], rtol=1e-5, atol=1e-6)


OTHER_USES = {
    "argmax": lambda x: x.argmax(-1),
    "one feature": lambda x: x[..., 2],
    "split": lambda x: x.split(4, dim=-1)[1],
    "softmax": lambda x: F.softmax(x, dim=-1),
    "transpose": lambda x: x.transpose(0, 1),
    "regroup across features": lambda x: x.reshape(-1),
    "double": lambda x: x.double(),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "detach": lambda x: x.detach(),
    "stack": lambda x: torch.stack([x, x]),
    "iteration": lambda x: torch.stack(list(x)),
    "arithmetic": lambda x: 2 * x - x.mean(),
    "item assignment": lambda x: _assign(x),
    "unbind": lambda x: x.unbind(0)[1],
}


MASK = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
FEWER = {  # reads of all rows, of which some are seen by nobody
    "masked mean": (lambda x: (x * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True), 6),
    "expanded mask": (lambda x: torch.sum(x * MASK.unsqueeze(-1).expand(x.size()).float(), 1), 6),
    "masked maximum": (lambda x: x.masked_fill(MASK[..., None] == 0, -1e9).max(1)[0], 6),
    "where": (lambda x: torch.where(MASK[..., None].bool(), x, torch.zeros(())), 6),
    "weights by bmm": (lambda x: torch.bmm(MASK[:, None].float(), x), 6),
    "packed sequence": (
        lambda x: nn.utils.rnn.pack_padded_sequence(x, MASK.sum(1), batch_first=True, enforce_sorted=False).data,
        6,
    ),
    "relu of rows": (lambda x: F.relu(x)[:, 0], BATCH),
    "LayerNorm of rows": (lambda x: F.layer_norm(x, (VOCABULARY,))[:, 1], BATCH),
    "linear of rows": (lambda x: F.linear(x, torch.arange(3.0 * VOCABULARY).view(3, -1) / 30)[:, 1], BATCH),
    "normalised rows": (lambda x: F.normalize(x, dim=-1)[:, 1], BATCH),
    "scaled rows": (lambda x: (2 * x)[0] / 3, LENGTH),
}


@pytest.mark.parametrize("name", FEWER)
def test_rows_that_nobody_will_see_are_left_out(setup, name):
    hidden, _, source, lazy, exact = setup
    read, rows = FEWER[name]
    ours, stock = read(lazy) + 0, read(exact)
    assert torch.allclose(ours, stock, rtol=1e-5, atol=1e-6)
    assert sum(source.asked) == rows
    upstream = torch.randn_like(stock)
    a, b = (torch.autograd.grad(value, hidden, upstream)[0] for value in (ours, stock))
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_second_reader_adds_rows(setup):
    _, _, source, lazy, exact = setup
    for pick in (lambda x: x[:, :2], lambda x: x[:, 1:4], lambda x: x[:, :2]):
        assert torch.allclose(pick(lazy) + 0, pick(exact), rtol=1e-5, atol=1e-6)
    assert source.asked == [BATCH * 2, BATCH * 2]


def _assign(x):
    x = x.clone()
    x[0, 0] = 1.0
    return x


@pytest.mark.parametrize("name", OTHER_USES)
def test_any_other_use_gives_what_stock_gives(setup, name):
    _, _, _, lazy, exact = setup
    ours, stock = OTHER_USES[name](lazy), OTHER_USES[name](exact)
    assert torch.allclose(ours + 0, stock, rtol=1e-5, atol=1e-6)


def test_an_in_place_change_of_a_clone_leaves_the_original(setup):
    _, _, _, lazy, exact = setup
    _assign(lazy)
    assert torch.allclose(lazy + 0, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labels", ["some", "all", "none"])
def test_cross_entropy_reads_labelled_rows_only(setup, reduction, labels):
    hidden, head, source, lazy, exact = setup
    target = torch.randint(VOCABULARY, (BATCH, LENGTH))
    if labels == "some":
        target[0, 1:4] = -100
    elif labels == "none":
        target[:] = -100
    shift = target[..., 1:].reshape(-1)
    logits = lazy[..., :-1, :].reshape(-1, VOCABULARY)
    loss = F.cross_entropy(logits, shift, reduction=reduction)
    stock = F.cross_entropy(exact[..., :-1, :].reshape(-1, VOCABULARY), shift, reduction=reduction)
    assert source.asked == [(shift != -100).sum()]
    assert torch.allclose(loss, stock, rtol=1e-5, atol=1e-6, equal_nan=True)
    upstream = torch.randn_like(loss)
    leaves = (hidden, head.weight, head.bias)
    for a, b in zip(
        torch.autograd.grad(loss, leaves, upstream), torch.autograd.grad(stock, leaves, upstream), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_class_weights_smoothing_and_another_ignore_index_reach_the_loss(setup):
    _, _, _, lazy, exact = setup
    target = torch.randint(VOCABULARY, (BATCH * LENGTH,))
    target[3] = 7
    options = {"weight": torch.rand(VOCABULARY), "label_smoothing": 0.1, "ignore_index": 7}
    ours = F.cross_entropy(lazy.view(-1, VOCABULARY), target, **options)
    assert torch.allclose(ours, F.cross_entropy(exact.view(-1, VOCABULARY), target, **options), rtol=1e-5)


def test_sources_compose(setup):
    hidden, _, source, _, _ = setup
    norm, head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
    normed = norm(PromisedRows.of(source, (BATCH, LENGTH)))
    logits = normed.with_source(logits_of(normed.state.source, head))
    assert torch.allclose(logits[:, 1] + 0, head(norm(hidden))[:, 1], rtol=1e-5, atol=1e-6)
    assert source.asked == [BATCH]


def test_reading_after_the_weights_changed_is_refused(setup):
    _, head, _, lazy, _ = setup
    with torch.no_grad():
        head.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="weights they depend on have changed since"):
        lazy.argmax(-1)


def test_values_once_read_survive_a_step(setup):
    _, head, _, lazy, exact = setup
    before = exact.detach().clone()
    lazy.sum()
    with torch.no_grad():
        head.weight.add_(1.0)
    assert torch.allclose(lazy.detach(), before, rtol=1e-5, atol=1e-6)


def test_autocast_at_the_time_of_the_promise_decides_the_dtype(setup):
    hidden, head, source, _, _ = setup
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lazy = PromisedRows.of(logits_of(source, head), (BATCH, LENGTH))
        exact = head(hidden)
    assert lazy.dtype == exact.dtype == torch.bfloat16
    assert torch.equal(lazy + 0, exact)
    assert lazy.float().dtype == torch.float32


def test_copies_pickles_and_prints_are_ordinary_tensors(setup):
    _, _, _, lazy, exact = setup
    for copied in (copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy))):
        assert type(copied) is torch.Tensor
        assert torch.allclose(copied, exact.detach(), rtol=1e-5, atol=1e-6)
    file = io.BytesIO()
    torch.save(lazy, file)
    file.seek(0)
    assert torch.allclose(torch.load(file), exact.detach(), rtol=1e-5, atol=1e-6)
    assert "tensor(" in repr(lazy)


def test_metadata_costs_nothing(setup):
    _, _, source, lazy, exact = setup
    assert (lazy.shape, lazy.dtype, lazy.device, lazy.dim(), lazy.numel(), len(lazy)) == (
        exact.shape,
        exact.dtype,
        exact.device,
        exact.dim(),
        exact.numel(),
        len(exact),
    )
    assert lazy.requires_grad
    assert isinstance(lazy, torch.Tensor)
    assert lazy.size(-1) == VOCABULARY
    assert source.asked == []
