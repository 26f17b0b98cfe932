"""Logits in training: the loss goes without them, and whoever reads them gets what stock computes."""

import copy
import io
import pickle

import pytest
import torch
from models import VOCABULARY, batch_of, build, gradients, loss_of
from torch.nn import functional as F

import fasttune
from fasttune import ops
from fasttune.patching.promises.tensor import PromisedRows, materialized


@pytest.fixture
def models():
    """A stock GPT-2 and one with nothing but the loss patched, so that hidden states agree to the last bit."""
    off = {"attention": False, "norms": False, "mlp": False, "embeddings": False}
    return build("GPT2LMHeadModel"), fasttune.patch(build("GPT2LMHeadModel"), **off)


def logits_of(models, **more):
    stock, ours = models
    inputs = batch_of(stock) | more
    expected, found = stock(**inputs).logits, ours(**inputs).logits
    assert type(found) is PromisedRows
    assert found.state.value is None
    return expected, found


READS = {
    "argmax": lambda x: x.argmax(-1),
    "softmax": lambda x: F.softmax(x, dim=-1),
    "log_softmax of a view": lambda x: F.log_softmax(x.view(-1, VOCABULARY), dim=-1),
    "arithmetic": lambda x: x * 2 + 1,
    "on the right": lambda x: 1 - x,
    "matmul": lambda x: x @ torch.ones(VOCABULARY, 2),
    "detach": lambda x: x.detach(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "tolist": lambda x: torch.tensor(x[0, 0].tolist()),
    "item": lambda x: torch.tensor(x[0, 0, 0].item()),
    "float": lambda x: x.float() + 0,
    "double": lambda x: x.double() + 0,
    "to": lambda x: x.to(torch.bfloat16) + 0,
    "shift": lambda x: x[..., :-1, :].contiguous() + 0,
    "last": lambda x: x[:, -1] + 0,
    "last, kept": lambda x: x[:, -1:, :] + 0,
    "column": lambda x: x[..., 5],
    "boolean rows": lambda x: x[torch.tensor([True, False, True])] + 0,
    "rows by number": lambda x: x[torch.tensor([2, 0, 2]), torch.tensor([1, 1, 5])] + 0,
    "reversed": lambda x: x.flip(1),
    "every other": lambda x: x[:, ::2] + 0,
    "flatten": lambda x: x.flatten(0, 1) + 0,
    "reshape": lambda x: x.reshape(3, -1),
    "transpose": lambda x: x.transpose(1, 2),
    "unbind": lambda x: torch.stack(x.unbind(0)),
    "iteration": lambda x: torch.stack(list(x)),
    "split": lambda x: torch.cat(x.split(2, dim=1), dim=1),
    "cat": lambda x: torch.cat([x, x]),
    "gather": lambda x: x.gather(-1, torch.zeros(3, 13, 1, dtype=torch.long)),
    "clone": lambda x: x.clone() + 0,
    "out-of-place mask": lambda x: x.masked_fill(torch.ones(VOCABULARY, dtype=torch.bool), 0.0),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())),
    "sum of a list": lambda x: sum([x, x]),
    "max": lambda x: x.max(-1).values,
    "topk": lambda x: x.topk(3).values,
}


CHOSEN = ("last", "last, kept", "shift", "boolean rows", "rows by number", "every other", "tolist", "item", "gather")


@pytest.mark.parametrize("read", READS)
def test_reads_give_stocks_values(models, read):
    expected, found = logits_of(models)
    a, b = materialized(READS[read](found)), READS[read](expected)
    assert type(a) is type(b)
    assert (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad)
    if read in (
        "last",
        "last, kept",
        "shift",
        "boolean rows",
        "rows by number",
        "every other",
        "tolist",
        "item",
        "gather",
    ):
        torch.testing.assert_close(a, b)  # only these rows are computed: the product's blocks differ
    else:
        assert torch.equal(a, b)


def test_metadata_needs_no_values(models):
    expected, found = logits_of(models)
    for ask in (
        lambda x: (x.shape, x.dtype, x.device, x.ndim, x.dim(), x.size(-1), x.numel(), len(x), x.requires_grad),
        lambda x: (x.is_floating_point(), x.layout, x.is_cuda, x.stride() if x is expected else expected.stride()),
        lambda x: x.view(-1, VOCABULARY).shape,
        lambda x: x[:, :-1].shape,
        lambda x: x[0].float().to("cpu").shape,
        lambda x: (torch.is_tensor(x), isinstance(x, torch.Tensor)),
    ):
        assert ask(found) == ask(expected)
    assert found.state.value is None


@pytest.mark.parametrize("copying", ["repr", "pickle", "torch.save", "to_tuple"])
def test_outputs_can_be_copied_and_printed(models, copying):
    stock, ours = models
    inputs = batch_of(stock)
    expected, found = stock(**inputs), ours(**inputs)
    if copying == "repr":
        assert repr(found.logits) == repr(expected.logits).replace(
            "UnsafeViewBackward0", "ViewBackward0"
        ) or "tensor(" in repr(found.logits)
    elif copying == "to_tuple":
        assert len(found.to_tuple()) == len(expected.to_tuple())
    elif copying == "pickle":
        assert torch.equal(pickle.loads(pickle.dumps(found.logits)), expected.logits)
    else:
        torch.save(found.logits, buffer := io.BytesIO())
        loaded = torch.load(io.BytesIO(buffer.getvalue()))
        assert type(loaded) is torch.Tensor
        assert torch.equal(loaded, expected.logits)
    assert torch.equal(copy.deepcopy(found.logits), expected.logits)


LOSSES = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weight": torch.linspace(0.5, 2, VOCABULARY)},
    "other ignore_index": {"ignore_index": 7},
    "all of it": {"label_smoothing": 0.2, "weight": torch.linspace(0.5, 2, VOCABULARY), "reduction": "sum"},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_of_ones_own(models, loss):
    stock, ours = models
    inputs = batch_of(stock)
    labels = inputs.pop("labels")[:, 1:].reshape(-1).clone()
    labels[::3] = LOSSES[loss].get("ignore_index", -100)

    def run(model):
        logits = model(**inputs).logits
        value = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), labels, **LOSSES[loss])
        value.sum().backward()
        if model is ours:
            assert logits.state.value is None
        return value.detach(), {name: p.grad for name, p in model.named_parameters()}

    (a, grads), (b, expected) = run(ours), run(stock)
    torch.testing.assert_close(a, b)
    for name in expected:
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-4, atol=1e-6)


def test_module_losses_and_several_losses_at_once(models):
    stock, ours = models
    inputs = batch_of(stock)
    labels = inputs.pop("labels").view(-1)

    def run(model):
        logits = model(**inputs).logits.view(-1, VOCABULARY)
        value = torch.nn.CrossEntropyLoss()(logits, labels)
        value = 0.5 * value + F.cross_entropy(logits[:5], labels[:5]) + logits.logsumexp(-1).mean()
        value.backward()
        return value.detach(), {name: p.grad for name, p in model.named_parameters()}

    (a, grads), (b, expected) = run(ours), run(stock)
    torch.testing.assert_close(a, b)
    for name in expected:
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-4, atol=1e-6)


def test_soft_targets_and_other_losses_read_the_logits(models):
    expected, found = logits_of(models)
    soft = torch.rand(39, VOCABULARY).softmax(-1)
    for loss in (
        lambda x: F.cross_entropy(x.view(-1, VOCABULARY), soft),
        lambda x: F.cross_entropy(x.transpose(1, 2), torch.ones(3, 13, dtype=torch.long)),
        lambda x: F.nll_loss(F.log_softmax(x.view(-1, VOCABULARY), -1), torch.ones(39, dtype=torch.long)),
        lambda x: F.kl_div(F.log_softmax(x, -1), soft.view(3, 13, -1), reduction="batchmean"),
    ):
        assert torch.equal(loss(found), loss(expected))


def test_num_items_in_batch(models):
    stock, ours = models
    for count in (7, torch.tensor(7)):
        inputs = batch_of(stock) | {"num_items_in_batch": count}
        (loss, grads), (our_loss, our_grads) = gradients(stock, inputs), gradients(ours, inputs)
        torch.testing.assert_close(our_loss, loss)
        for name in grads:
            torch.testing.assert_close(our_grads[name], grads[name], rtol=1e-4, atol=1e-6)


def test_writes_are_seen_through_every_view(models):
    def edited(logits):
        flat = logits.view(-1, VOCABULARY)
        logits[..., 0] = -9.0
        first = flat[:4] + 0
        logits /= 2
        return first, flat, logits, F.cross_entropy(flat, torch.ones(39, dtype=torch.long))

    expected, found = logits_of(models)
    for a, b in zip(edited(found.clone()), edited(expected.clone()), strict=True):
        assert torch.equal(a + 0, b)
    assert torch.equal(found + 0, expected)
    with pytest.raises(RuntimeError, match="Clone it first"):
        logits_of(models)[1][:, -1].mul_(2)


def test_reading_after_the_weights_changed_raises(models):
    _, ours = models
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    inputs = batch_of(ours)
    outputs = ours(**inputs)
    read_before = ours(**inputs).logits
    values = read_before + 0
    outputs.loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="Read them before the step, or patch with"):
        outputs.logits.argmax(-1)
    assert torch.equal(read_before + 0, values)
    ours.eval()
    assert type(ours(**inputs).logits) is torch.Tensor


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_autocast(head):
    """Dtypes as stock's, and values as stock's inside and outside the context."""
    stock, ours = build(head), fasttune.patch(build(head))
    inputs = batch_of(stock)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = stock(**inputs), ours(**inputs)
        assert found.loss.dtype == expected.loss.dtype == torch.float32
        assert found.logits.dtype == expected.logits.dtype
    torch.testing.assert_close(found.loss, expected.loss, rtol=2e-2, atol=0)
    values = found.logits + 0
    assert values.dtype == torch.bfloat16
    torch.testing.assert_close(values.float(), expected.logits.float(), rtol=5e-2, atol=5e-2)
    found.loss.backward()


def test_half_precision_logits_cast_before_the_loss_have_a_float32_loss():
    stock, ours = (build("GPT2LMHeadModel").bfloat16() for _ in range(2))
    fasttune.patch(ours)
    inputs = batch_of(stock)
    assert ours(**inputs).loss.dtype == stock(**inputs).loss.dtype == torch.float32
    stock, ours = (build("BertForMaskedLM").bfloat16() for _ in range(2))
    fasttune.patch(ours)
    inputs = batch_of(stock)
    assert ours(**inputs).loss.dtype == stock(**inputs).loss.dtype == torch.bfloat16


def test_labels_out_of_range_and_no_labels_at_all(models):
    stock, ours = models
    inputs = batch_of(stock)
    with pytest.raises(IndexError):
        ours(**inputs | {"labels": inputs["labels"] + VOCABULARY})
    nothing = inputs | {"labels": torch.full_like(inputs["labels"], -100)}
    assert torch.isnan(stock(**nothing).loss)
    assert torch.isnan(ours(**nothing).loss)


def test_evaluation_and_frozen_models_return_plain_tensors(models):
    _, ours = models
    inputs = batch_of(ours)
    with torch.no_grad():
        assert type(ours(**inputs).logits) is torch.Tensor
    ours.requires_grad_(False)
    assert type(ours(**inputs).logits) is torch.Tensor
    assert type(torch.func.functional_call(ours, dict(ours.named_parameters()), (), inputs).logits) is torch.Tensor


@pytest.fixture
def losses(monkeypatch):
    """Rows and backend of each loss without logits."""
    seen, original = [], ops.linear_cross_entropy

    def spy(x, *args, backend=None, **options):
        seen.append((x.shape[0], backend))
        return original(x, *args, backend=backend, **options)

    monkeypatch.setattr(ops, "linear_cross_entropy", spy)
    return seen


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_backend_that_was_asked_for_computes_the_loss(losses, backend):
    model = fasttune.patch(build("BertForMaskedLM"), backend=backend)
    loss_of(model, batch_of(model)).backward()
    assert [asked for _, asked in losses] == [None if backend == "auto" else backend]


@pytest.mark.parametrize("head", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_without_trim_no_rows_are_looked_for(losses, head):
    """Their number would have to come from the device."""
    model = build(head)
    inputs = batch_of(model)  # rows at padding are left out whether or not
    loss_of(fasttune.patch(model, trim=False), inputs).backward()
    loss_of(fasttune.patch(model), inputs).backward()
    (every, _), (few, _) = losses
    assert every == inputs["labels"].numel()
    labels = inputs["labels"] if head == "BertForMaskedLM" else inputs["labels"][:, 1:]
    assert few == int((labels != -100).sum())
