"""Sequences packed into rows by the user see nothing of each other: each gives what it gives alone."""

import copy

import pytest
import torch
from models import batch_of, build, gradients
from transformers import DataCollatorWithFlattening

import fasttune

LENGTHS = [5, 1, 9, 4]
HEADS = ["GPT2LMHeadModel", "BertLMHeadModel", "BertForMaskedLM", "BertForTokenClassification", "RobertaForMaskedLM"]


def sequences(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 90, (length,), generator=g) for length in LENGTHS]


def packed_inputs(head, how="cu_seq_lens", labels=True):
    ids = sequences()
    starts = 2 if head.startswith("Roberta") else 0
    inputs = {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat([torch.arange(len(x)) + starts for x in ids])[None],
    }
    if how == "position_ids":
        inputs["use_cache"] = False  # with a cache stock attends to the whole row
    else:
        offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
        inputs |= {"max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}
    if labels:
        inputs["labels"] = torch.cat([labels_of(head, x) for x in ids])[None]
    return inputs


def labels_of(head, ids):
    labels = ids % 3 if "TokenClassification" in head else ids.clone()
    if head.endswith("LMHeadModel"):
        labels[0] = -100  # no sequence predicts the next one's first token
    return labels


def alone(model, head, labels=True):
    """Logits of each sequence by itself, side by side, and the loss over all of their labels."""
    starts = 2 if head.startswith("Roberta") else 0
    logits = []
    for ids in sequences():
        logits.append(model(ids[None], position_ids=torch.arange(len(ids))[None] + starts).logits[0])
    return torch.cat(logits)


def loss_alone(model, head):
    logits = alone(model, head)
    labels = torch.cat([labels_of(head, x) for x in sequences()])
    if head.endswith("LMHeadModel"):
        logits, labels = logits[:-1], labels[1:]
    return torch.nn.functional.cross_entropy(logits, labels)


# Position ids separate sequences where stock takes them so: in GPT-2. Explicit offsets do everywhere.
@pytest.mark.parametrize(("head", "how"), [("GPT2LMHeadModel", "position_ids"), *((h, "cu_seq_lens") for h in HEADS)])
def test_training_isolates(head, how):
    model = build(head)
    exact_model = copy.deepcopy(model).double()
    exact_loss = loss_alone(exact_model, head)
    exact_loss.backward()
    exact = {name: p.grad for name, p in exact_model.named_parameters() if p.grad is not None}
    stock_loss = loss_alone(model, head)
    stock_loss.backward()
    stock = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    fasttune.patch(model)
    loss, grads = gradients(model, packed_inputs(head, how))
    assert abs(loss - exact_loss) <= 2 * abs(stock_loss - exact_loss) + 4 * 1.2e-7 * exact_loss.abs()
    largest = max(grad.abs().max().item() for grad in exact.values())
    for name, truth in exact.items():
        scale = truth.abs().max().item()
        floor = 8 * torch.finfo(torch.float32).eps * (scale if scale > 1e-10 * largest else largest)
        assert (grads[name] - truth).abs().max() <= 2 * (stock[name] - truth).abs().max() + floor, name


@pytest.mark.parametrize("head", HEADS)
def test_evaluation_isolates(head):
    model = build(head, dropout=0.1).eval()
    with torch.no_grad():
        expected = alone(model, head)
        logits = fasttune.patch(model)(**packed_inputs(head)).logits
    assert type(logits) is torch.Tensor
    assert torch.allclose(logits[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_where_attention_runs_stocks_way_it_isolates_too(head):
    model = build(head, dropout=0.0).double()  # no kernel computes in float64
    expected = alone(model, head)
    logits = fasttune.patch(model)(**packed_inputs(head)).logits + 0
    assert torch.allclose(logits[0], expected, rtol=1e-10, atol=1e-12)


def test_filling_a_cache_leaks_nothing():
    model = build("GPT2LMHeadModel")
    expected = alone(model, "GPT2LMHeadModel")
    leaking = model(**packed_inputs("GPT2LMHeadModel"), use_cache=True).logits[0]
    assert not torch.allclose(leaking, expected, rtol=1e-3, atol=1e-3)  # stock does, which is why this is a feature
    outputs = fasttune.patch(model)(**packed_inputs("GPT2LMHeadModel"), use_cache=True)
    assert torch.allclose(outputs.logits[0] + 0, expected, rtol=1e-4, atol=1e-5)


def test_several_rows_of_sequences():
    model = build("GPT2LMHeadModel").eval()
    inputs = packed_inputs("GPT2LMHeadModel", "position_ids", labels=False)
    doubled = {name: inputs[name].expand(2, -1) for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        expected = alone(model, "GPT2LMHeadModel")
        logits = fasttune.patch(model)(**doubled, use_cache=False).logits
    for row in logits:
        assert torch.allclose(row, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_gradient_checkpointing(head, reentrant):
    model = fasttune.patch(build(head, dropout=0.2))
    inputs = packed_inputs(head)
    model.enable_input_require_grads()  # what checkpointing does as well: a hook, which embeddings step aside for
    torch.manual_seed(1)
    loss, grads = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(1)
    again, grads_again = gradients(model, inputs)
    assert torch.allclose(again, loss, rtol=1e-5)
    for name, grad in grads.items():
        assert torch.allclose(grads_again[name], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item() + 1e-8), name


def test_transformers_own_collator():
    model = build("GPT2LMHeadModel")
    features = [{"input_ids": x.tolist()} for x in sequences()]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features)
    expected = loss_alone(model, "GPT2LMHeadModel")
    assert torch.allclose(fasttune.patch(model)(**batch).loss, expected, rtol=1e-5)


def test_positions_that_only_start_late_or_run_backwards_are_no_sequences():
    model = build("BertForMaskedLM").eval()
    inputs = packed_inputs("BertForMaskedLM", labels=False)
    inputs = {"input_ids": inputs["input_ids"]}
    length = inputs["input_ids"].shape[1]
    for positions in (
        torch.arange(length) % 7,
        torch.arange(length) + 3,
        torch.arange(length).flip(0),
        torch.arange(length) // 2,
    ):
        inputs["position_ids"] = positions[None]
        with torch.no_grad():
            expected = model(**inputs).logits
            logits = fasttune.patch(model)(**inputs).logits
        assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)
        fasttune.unpatch(model)


def test_switched_off_it_is_stock():
    model = build("BertForMaskedLM").eval()
    inputs = batch_of(model, padding="right")
    with torch.no_grad():
        stock = model(**inputs).logits
        off = fasttune.patch(model, packing=False)(**inputs).logits
    assert torch.allclose(off, stock, rtol=1e-4, atol=1e-5)
