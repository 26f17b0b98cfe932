"""Patched models in a plain loop and under torch.compile; the Trainer is in tests/stacks."""

import copy

import pytest
import torch
from models import batch_of, build, gradients, loss_of

import fasttune

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForSequenceClassification", "BertForMaskedLM"])
def test_plain_loop_follows_stock(head):
    losses = {}
    for patched in (False, True):
        model = build(head)
        if patched:
            fasttune.patch(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(6):
            loss = loss_of(model, batch_of(model, seed=step, padding=[None, "right", "left"][step % 3]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.setdefault(patched, []).append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[True]), torch.tensor(losses[False]), rtol=2e-4, atol=0)


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM", "BertForSequenceClassification"])
@pytest.mark.filterwarnings("ignore")
def test_compiled_model(head):
    stock, ours = build(head), fasttune.patch(build(head))
    inputs = batch_of(stock) | ({"use_cache": False} if head.startswith("GPT2") else {})
    loss, grads = gradients(stock, inputs)
    compiled = torch.compile(ours, backend="aot_eager")
    ours.zero_grad()
    our_loss = compiled(**inputs).loss
    our_loss.backward()
    torch.testing.assert_close(our_loss, loss)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


def test_patching_a_compiled_model_and_back():
    model = build("BertForSequenceClassification")
    inputs = batch_of(model)
    expected = loss_of(model, inputs)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    assert fasttune.patch(compiled) is compiled
    torch.testing.assert_close(compiled(**inputs).loss, expected)
    fasttune.unpatch(compiled)
    torch.testing.assert_close(compiled(**inputs).loss, expected)
    torch._dynamo.reset()


def test_two_threads_train_two_models():
    from concurrent.futures import ThreadPoolExecutor

    heads = ["GPT2LMHeadModel", "BertForMaskedLM", "GPT2LMHeadModel", "BertForSequenceClassification"]
    models = [fasttune.patch(build(head)) for head in heads]

    def losses(model):
        return [gradients(model, batch_of(model, padding="right", seed=step))[0].item() for step in range(4)]

    alone = [losses(model) for model in models]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(losses, models)) == alone
