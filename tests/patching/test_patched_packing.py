"""Padding leaves before the first layer and comes back after the last, wherever nobody reads it."""

import copy
import types

import pytest
import torch
from models import BERT_HEADS, GPT2_HEADS, RELATIVES, batch_of, build, gradients, loss_of
from transformers import BertForSequenceClassification, BertModel, GPT2Model

import fasttune
from fasttune import ops

# Question answering reads all rows, models without a head hand them to their caller.
READ_EVERYTHING = ("Model", "QuestionAnswering")
# Decoders of the BERT family fill a cache by default, which wants whole rows.
PACKED = [
    head
    for head in (*GPT2_HEADS, *BERT_HEADS, *RELATIVES)
    if not (head.endswith(READ_EVERYTHING) and "LMHead" not in head and "DoubleHeads" not in head)
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


def no_cache(model):
    model.config.use_cache = False
    return model


def notes(model, option="(packing)"):
    return next(row.note for row in fasttune.report(model).rows if row.modules == option)


@pytest.mark.parametrize("padding", ["right", "left", "scattered"])
@pytest.mark.parametrize("head", PACKED)
def test_layers_see_real_tokens_only(head, padding, rows_of_mlps):
    """And rows at padding where these are read, as queries over the real ones, once the others are done."""
    model = no_cache(build(head))
    inputs = batch_of(model, batch=4, padding=padding)
    mask = inputs["attention_mask"]
    fasttune.patch(model, trim=False)
    loss_of(model, inputs).backward()
    assert rows_of_mlps[:2] == [int(mask.sum())] * 2
    assert all(rows <= int((mask == 0).sum()) for rows in rows_of_mlps[2:])
    assert notes(model) == ""


@pytest.mark.parametrize("padding", ["left", "scattered"])
def test_padding_that_predicts_a_labelled_token_is_computed(padding, rows_of_mlps):
    model = no_cache(build("GPT2LMHeadModel"))
    inputs = batch_of(model, batch=4, padding=padding)
    expected, stock = gradients(model, inputs)
    loss, grads = gradients(fasttune.patch(model, trim=False), inputs)
    assert torch.allclose(loss, expected, rtol=1e-5)
    for name, grad in stock.items():
        assert torch.allclose(grads[name], grad, rtol=1e-3, atol=1e-5 * grad.abs().max().item() + 1e-8), name
    mask, labels = inputs["attention_mask"], inputs["labels"]
    at_padding = int(((labels[:, 1:] != -100) & (mask[:, :-1] == 0)).sum())
    assert at_padding > 0
    assert rows_of_mlps == [int(mask.sum())] * 2 + [at_padding] * 2


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "GPT2ForSequenceClassification"])
def test_evaluation_packs_and_gives_stocks_logits(head, rows_of_mlps):
    model = build(head, dropout=0.1).eval()
    inputs = batch_of(model, batch=4, padding="right")
    with torch.no_grad():
        stock = model(**inputs).logits
        exact = copy.deepcopy(model).double()(**inputs).logits
        ours = fasttune.patch(model, trim=False)(**inputs).logits
    assert type(ours) is torch.Tensor
    assert (ours - exact).abs().max() <= 2 * (stock - exact).abs().max() + 4 * 1.2e-7 * exact.abs().max()
    assert rows_of_mlps == [int(inputs["attention_mask"].sum())] * 2


@pytest.mark.parametrize("packing", [True, "auto"])
@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM", "BertForTokenClassification"])
def test_logits_at_padding_are_stocks(head, packing, rows_of_mlps):
    """In evaluation all of them at once: somebody will read them."""
    model = build(head).eval()
    inputs = batch_of(model, batch=4, padding="right")
    with torch.no_grad():
        stock = model(**inputs).logits
        ours = fasttune.patch(model, packing=packing)(**inputs).logits
    assert type(ours) is torch.Tensor
    assert torch.allclose(ours, stock, rtol=1e-4, atol=1e-5)
    assert rows_of_mlps == [inputs["input_ids"].numel()] * 2


@pytest.mark.parametrize("trim", [False, "auto"])
@pytest.mark.parametrize("padding", ["right", "scattered"])
@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForSequenceClassification", "GPT2LMHeadModel"])
def test_dropout_drops_what_it_drops_in_the_padded_batch(head, padding, trim, rows_of_mlps):
    model = no_cache(build(head, dropout=0.3))
    inputs = batch_of(model, batch=4, padding=padding)
    if head == "GPT2LMHeadModel":  # a hole that predicts takes its keys' places as they are packed
        inputs["labels"][torch.nn.functional.pad(inputs["attention_mask"], (1, -1)) == 0] = -100
    found = []
    for options in ({"packing": False, "trim": False}, {"trim": trim}):
        fasttune.patch(model, **options)
        torch.manual_seed(6)
        found.append(gradients(model, inputs))
    (loss, grads), (packed_loss, packed_grads) = found
    assert rows_of_mlps[:2] != rows_of_mlps[2:]
    assert torch.allclose(packed_loss, loss, rtol=1e-5)
    for name, grad in grads.items():
        assert torch.allclose(packed_grads[name], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item() + 1e-8), name


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cls", [BertModel, GPT2Model])
def test_hidden_states_of_a_bare_model(cls, training, rows_of_mlps):
    model = no_cache(build(cls.__name__)).train(training)
    inputs = batch_of(model, batch=4, padding="right")
    real = inputs["attention_mask"].bool()
    with torch.set_grad_enabled(training):
        stock = model(**inputs).last_hidden_state
        fasttune.patch(model)
        rows_of_mlps.clear()
        first = model(**inputs).last_hidden_state[:, 0] + 0
        assert rows_of_mlps == [int(real.sum()), 4]  # a reader of few rows pays for few
        every = model(**inputs).last_hidden_state
    assert torch.allclose(first, stock[:, 0], rtol=1e-4, atol=1e-5)
    assert torch.allclose(every, stock, rtol=1e-4, atol=1e-5)  # the caller may read padding


NAMES = {"BertForMaskedLM": "encoder.layer.0", "GPT2LMHeadModel": "h.0"}
ASIDES = {
    "hooks inside a layer": "hooks on",
    "a replaced forward": "",
    "packing=False": "packing=False",
    "chunked": "chunk_size_feed_forward",
}


@pytest.mark.parametrize("reason", ASIDES)
@pytest.mark.parametrize("head", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_steps_aside(head, reason, rows_of_mlps):
    if reason == "chunked" and head == "GPT2LMHeadModel":
        pytest.skip("GPT-2 has no such option")
    model = no_cache(build(head))
    if reason == "chunked":
        for layer in model.bert.encoder.layer:
            layer.chunk_size_feed_forward = 13
    inputs = batch_of(model, batch=4, padding="right")
    layers = model.bert.encoder.layer if head.startswith("Bert") else model.transformer.h
    seen = []
    stock = copy.deepcopy(model)
    fasttune.patch(model, packing=reason != "packing=False" and "auto")
    expected, _ = gradients(stock, inputs)
    if reason == "hooks inside a layer":
        next(layers[1].children()).register_forward_hook(lambda *a: seen.append(1))
    if reason == "a replaced forward":
        layers[0].forward = types.MethodType(type(stock.base_model.get_submodule(NAMES[head])).forward, layers[0])
    rows_of_mlps.clear()
    loss, _ = gradients(model, inputs)
    assert torch.allclose(loss, expected, rtol=1e-5)
    at_least = inputs["attention_mask"].numel() if reason in ("packing=False", "chunked") else 0
    assert max(rows_of_mlps) >= at_least
    assert ASIDES[reason] in notes(model)
    if reason.startswith("hooks"):
        assert seen


def test_four_dimensional_masks_that_are_padding_pack_too(rows_of_mlps):
    model = build("GPT2LMHeadModel")
    inputs = batch_of(model, batch=4, padding="right")
    mask = inputs.pop("attention_mask")
    length = mask.shape[1]
    square = (torch.ones(length, length).tril().bool() & mask.bool()[:, None]).unsqueeze(1)
    expected, _ = gradients(model, {**inputs, "attention_mask": square})
    fasttune.patch(model, trim=False)
    loss, _ = gradients(model, {**inputs, "attention_mask": square})
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert rows_of_mlps == [int(mask.sum())] * 2
    rows_of_mlps.clear()
    square[0, 0, 5, 2] = False  # and what is no pattern runs as it stands
    loss, _ = gradients(model, {**inputs, "attention_mask": square})
    assert rows_of_mlps == [mask.numel()] * 2
    expected, _ = gradients(fasttune.unpatch(model), {**inputs, "attention_mask": square})
    assert torch.allclose(loss, expected, rtol=1e-5)


def test_a_decoder_that_fills_a_cache_steps_aside():
    decoder = build("BertLMHeadModel")
    inputs = batch_of(decoder, batch=4, padding="right") | {"labels": None, "use_cache": True}
    expected = decoder(**inputs)
    ours = fasttune.patch(decoder)(**inputs)
    assert torch.allclose(ours.logits + 0, expected.logits, rtol=1e-4, atol=1e-5)
    for theirs, mine in zip(expected.past_key_values.layers, ours.past_key_values.layers, strict=True):
        assert torch.allclose(mine.keys, theirs.keys, rtol=1e-4, atol=1e-5)
    assert "past_key_values given" in notes(decoder)


def test_a_cache_that_training_fills_is_stocks():
    model = build("GPT2LMHeadModel")
    inputs = batch_of(model, batch=4, padding="right")
    stock = model(**inputs, use_cache=True).past_key_values
    for trim in (False, "auto"):
        fasttune.patch(model, trim=trim)
        ours = model(**inputs, use_cache=True).past_key_values
        assert notes(model) == ""
        for theirs, mine in zip(stock.layers, ours.layers, strict=True):
            for a, b in ((theirs.keys, mine.keys), (theirs.values, mine.values)):
                assert a.shape == b.shape
                assert torch.allclose(a, b + 0, rtol=1e-4, atol=1e-5)


def test_a_full_mask_makes_no_plan(rows_of_mlps):
    model = fasttune.patch(build("BertForMaskedLM"), trim=False)
    inputs = batch_of(model)
    masked = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    with_mask, without = (gradients(model, x) for x in (masked, inputs))
    assert torch.equal(with_mask[0], without[0])
    assert all(torch.equal(with_mask[1][name], without[1][name]) for name in without[1])
    assert rows_of_mlps == [inputs["input_ids"].numel()] * 4


class MeanPooled(BertForSequenceClassification):
    """A user's own head: reads every real token."""

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.classifier((hidden * weights).sum(1) / weights.sum(1))
        return torch.nn.functional.cross_entropy(logits, labels)


def test_a_subclass_with_its_own_forward_may_read_anything():
    stock = build("BertForSequenceClassification")
    model = MeanPooled(stock.config).train()
    model.load_state_dict(stock.state_dict())
    inputs = batch_of(stock, batch=4, padding="right")
    inputs.pop("token_type_ids")
    expected = model(**inputs)
    assert torch.allclose(fasttune.patch(model)(**inputs), expected, rtol=1e-5)
    assert notes(model) == ""


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("head", ["BertForSequenceClassification", "GPT2LMHeadModel"])
def test_gradient_checkpointing(head, reentrant, rows_of_mlps):
    model = no_cache(build(head, dropout=0.2))
    inputs = batch_of(model, batch=4, padding="right")
    fasttune.patch(model, trim=False)
    model.enable_input_require_grads()  # what checkpointing does as well: a hook, which embeddings step aside for
    torch.manual_seed(2)
    loss, grads = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(2)
    again, grads_again = gradients(model, inputs)
    real, every = int(inputs["attention_mask"].sum()), inputs["attention_mask"].numel()
    # Each layer ran twice the second time. A reentrant checkpoint takes no promise at first, and reads all rows again.
    assert rows_of_mlps[:6] == [real] * 2 + ([every, every, real, every - real] if reentrant else [real] * 4)[:4]
    assert torch.allclose(again, loss, rtol=1e-5)
    for name, grad in grads.items():
        assert torch.allclose(grads_again[name], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item() + 1e-8), name
