"""The last layer computes keys and values for all rows and the rest for the rows that are read, and nobody can tell."""

import copy

import pytest
import torch
from models import batch_of, build, gradients, loss_of
from torch.nn import functional as F

import fasttune
from fasttune import ops
from fasttune.patching.promises.tensor import PromisedRows

IGNORED = -100
TRIMMED = [
    "GPT2LMHeadModel",
    "GPT2ForSequenceClassification",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertForSequenceClassification",
    "BertForNextSentencePrediction",
    "BertForMultipleChoice",
    "RobertaForMaskedLM",
    "RobertaForSequenceClassification",
    "XLMRobertaForSequenceClassification",
    "CamembertForMaskedLM",
    "ElectraForMaskedLM",
    "ElectraForSequenceClassification",
    "ElectraForMultipleChoice",
]


@pytest.fixture
def rows_of_mlps(monkeypatch):
    """How many rows each MLP worked on."""
    seen = []
    original = ops.bias_activation

    def recording(x, *args, **kwargs):
        seen.append(x.numel() // x.shape[-1])
        return original(x, *args, **kwargs)

    monkeypatch.setattr(ops, "bias_activation", recording)
    return seen


def few_labels(inputs):
    """Token labels for the second half of each sequence alone, as after a prompt; others are left."""
    labels = inputs["labels"]
    if labels.dim() > 1 and labels.shape == inputs["input_ids"].shape and labels.shape[-1] > 2:
        labels = labels.clone()
        labels[..., : labels.shape[-1] // 2] = IGNORED
    return {**inputs, "labels": labels}


def notes(model):
    return next(row.note for row in fasttune.report(model).rows if row.modules == "(trim)")


def rows_that_are_read(head, inputs):
    labels, sequences = inputs["labels"], inputs["input_ids"].flatten(0, -2).shape[0]
    if head == "BertForPreTraining":  # read apart: the labelled rows by one part of the head, the first by the other
        return {int((labels != IGNORED).sum()), sequences}
    if head.endswith("LMHeadModel"):
        return {int((labels[:, 1:] != IGNORED).sum())}
    if head.endswith("MaskedLM"):
        return {int((labels != IGNORED).sum())}
    return {sequences}


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("head", TRIMMED)
def test_only_rows_that_are_read(head, padding, rows_of_mlps):
    model = build(head)
    model.config.use_cache = False
    inputs = few_labels(batch_of(model, batch=4, padding=padding))
    stock_loss, stock = gradients(model, inputs)
    exact_loss, exact = gradients(copy.deepcopy(model).double(), inputs)
    rows_of_mlps.clear()
    fasttune.patch(model)
    loss, grads = gradients(model, inputs)
    real = int(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum())
    assert rows_of_mlps[0] == real
    assert set(rows_of_mlps[1:]) == rows_that_are_read(head, inputs)
    assert notes(model) == ""
    largest = max(grad.abs().max().item() for grad in exact.values())
    assert grads.keys() == stock.keys()
    for name, truth in {"loss": exact_loss, **exact}.items():
        ours, theirs = {"loss": loss, **grads}[name], {"loss": stock_loss, **stock}[name]
        scale = truth.abs().max().item()
        floor = 8 * torch.finfo(torch.float32).eps * (scale if scale > 1e-10 * largest else largest)
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + floor, name


@pytest.mark.parametrize("padding", [None, "right", "scattered"])
@pytest.mark.parametrize(
    "head", ["GPT2LMHeadModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForPreTraining"]
)
def test_dropout_of_a_row_is_the_same_alone_and_among_all(head, padding):
    model = build(head, dropout=0.3)
    model.config.use_cache = False
    inputs = few_labels(batch_of(model, batch=4, padding=padding))
    found = []
    for trim in (False, "auto"):
        fasttune.patch(model, trim=trim)
        torch.manual_seed(5)
        found.append(gradients(model, inputs))
    (loss, grads), (trimmed_loss, trimmed) = found
    assert torch.allclose(trimmed_loss, loss, rtol=1e-5)
    for name, grad in grads.items():
        assert torch.allclose(trimmed[name], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item() + 1e-8), name


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM", "RobertaForMaskedLM", "ElectraForMaskedLM"])
def test_logits_read_after_the_loss_are_those_of_the_loss(head, padding):
    model = build(head, dropout=0.3)
    inputs = few_labels(batch_of(model, batch=4, padding=padding))
    fasttune.patch(model)
    outputs = model(**inputs)
    assert isinstance(outputs.logits, PromisedRows)
    logits, labels = outputs.logits + 0, inputs["labels"]
    if head == "GPT2LMHeadModel":
        logits, labels = logits[:, :-1], labels[:, 1:]
    again = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert torch.allclose(again, outputs.loss, rtol=1e-5)
    ours = torch.autograd.grad(outputs.loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(again, list(model.parameters()), allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item() + 1e-8)


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_logits_of_all_rows_are_stocks(head):
    model = build(head)
    inputs = few_labels(batch_of(model))
    stock = model(**inputs).logits
    exact = copy.deepcopy(model).double()(**inputs).logits
    ours = fasttune.patch(model)(**inputs).logits + 0
    floor = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (stock - exact).abs().max() + floor


def test_logits_read_after_a_step_are_refused():
    model = fasttune.patch(build("GPT2LMHeadModel"))
    inputs = few_labels(batch_of(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = model(**inputs)
    outputs.loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="weights they depend on have changed"):
        outputs.logits.argmax(-1)


def test_evaluation(rows_of_mlps):
    model = build("BertForSequenceClassification", dropout=0.1).eval()
    inputs = batch_of(model, batch=4, padding="right")
    with torch.no_grad():
        stock = model(**inputs)
        ours = fasttune.patch(model)(**inputs)
    assert type(ours.logits) is torch.Tensor
    assert not ours.logits.requires_grad
    assert torch.allclose(ours.logits, stock.logits, rtol=1e-4, atol=1e-5)
    assert rows_of_mlps == [int(inputs["attention_mask"].sum()), 4]
    lm = fasttune.patch(build("GPT2LMHeadModel").eval())
    rows_of_mlps.clear()
    with torch.no_grad():
        lm(**few_labels(batch_of(lm)))
    assert len(set(rows_of_mlps)) == 1  # evaluation returns all logits
    rows_of_mlps.clear()
    lm(**few_labels(batch_of(lm)))
    assert rows_of_mlps[-1] < rows_of_mlps[0]  # where gradients are recorded, those without a label wait


ASIDES = {
    "hooks inside the layer": "hooks on",
    "checkpointing": "checkpointing",
    "an adapter of one's own": "is not the Linear",
    "trim=False": "trim=False",
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("reason", ASIDES)
@pytest.mark.parametrize("head", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_steps_aside(head, reason, rows_of_mlps):
    model = build(head)
    model.config.use_cache = False
    inputs = few_labels(batch_of(model))
    expected, _ = gradients(model, inputs)
    fasttune.patch(model, trim=reason != "trim=False" and "auto")
    base = model.base_model
    last = base.encoder.layer[-1] if head.startswith("Bert") else base.h[-1]
    if reason == "hooks inside the layer":
        next(last.children()).register_forward_pre_hook(lambda *a: None)
    if reason == "checkpointing":
        model.gradient_checkpointing_enable()
    if reason == "an adapter of one's own":
        where, name = (last.attention.self, "query") if head.startswith("Bert") else (last.attn, "c_attn")
        setattr(where, name, torch.nn.Sequential(torch.nn.Dropout(1e-9), getattr(where, name)))
    rows_of_mlps.clear()
    loss, _ = gradients(model, inputs)
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert len(set(rows_of_mlps)) == 1
    assert ASIDES[reason] in notes(model)


@pytest.mark.parametrize("looking", ["hidden states", "hooks on the layer", "hooks around the layer"])
@pytest.mark.parametrize("head", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_looking_on_costs_nothing(head, looking, rows_of_mlps):
    """What is handed to a hook, or among the hidden states, is complete: it is computed if somebody reads it."""
    model = build(head)
    model.config.use_cache = False
    inputs = few_labels(batch_of(model))
    if looking == "hidden states":
        inputs["output_hidden_states"] = True
    expected, _ = gradients(model, inputs)
    fasttune.patch(model)
    last = model.base_model.encoder.layer[-1] if head.startswith("Bert") else model.base_model.h[-1]
    if looking == "hooks on the layer":
        last.register_forward_hook(lambda *a: None)
    if looking == "hooks around the layer":
        model.base_model.register_forward_hook(lambda *a: None)
    rows_of_mlps.clear()
    loss, _ = gradients(model, inputs)
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert set(rows_of_mlps[1:]) == rows_that_are_read(head, inputs)


def test_nothing_to_gain_is_left_alone(rows_of_mlps):
    model = fasttune.patch(build("GPT2LMHeadModel"))
    inputs = batch_of(model)  # every token is a label
    loss_of(model, inputs).backward()
    assert len(set(rows_of_mlps)) == 1
    assert notes(model) == "has not run yet"


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "GPT2LMHeadModel"])
def test_autocast(head, rows_of_mlps):
    model = build(head)
    model.config.use_cache = False
    inputs = few_labels(batch_of(model, batch=4, padding="right"))
    exact, _ = gradients(copy.deepcopy(model).double(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = model(**inputs).loss
    fasttune.patch(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = model(**inputs).loss
    assert set(rows_of_mlps[-1:]) == rows_that_are_read(head, inputs)
    assert ours.dtype == stock.dtype
    assert abs(ours - exact) <= 2 * abs(stock - exact) + torch.finfo(torch.bfloat16).eps * exact.abs()


def other_labels(logits, labels, vocab_size, **rest):
    labels = labels.clone()
    labels[0, 0] = 1 if labels[0, 0] == IGNORED else IGNORED
    return F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1))


def test_a_loss_of_ones_own_may_change_the_labels():
    model = build("GPT2LMHeadModel")
    model.loss_function = other_labels
    inputs = few_labels(batch_of(model))
    expected, _ = gradients(model, inputs)
    loss, _ = gradients(fasttune.patch(model), inputs)
    assert torch.allclose(loss, expected, rtol=1e-5)
