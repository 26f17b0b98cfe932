"""A weight that is lookup table and head: one gradient, written once, whoever watches it."""

import copy

import pytest
import torch
from models import batch_of, build, copy_in, gradients, loss_of
from oracle import max_error
from torch.utils.checkpoint import checkpoint

import fasttune
from fasttune.ops import tied

# Not GPT2DoubleHeadsModel, whose ids have three dimensions: there autograd adds the two gradients.
TIED = ["GPT2LMHeadModel", "BertForMaskedLM", "BertForPreTraining", "RobertaForMaskedLM"]


@pytest.fixture
def ties(monkeypatch):
    """How often two gradients met before they reached the weight."""
    met = []
    original = tied._Tie.backward

    def counting(ctx, lookup, head):
        if ctx.probe is None:
            met.append((lookup is not None and lookup.is_sparse, head is not None))
        return original(ctx, lookup, head)

    monkeypatch.setattr(tied._Tie, "backward", staticmethod(counting))
    return met


def weight_of(model):
    return model.get_input_embeddings().weight


def bound(model, inputs):
    """(exact gradient, allowed error): twice stock's own and a floor."""
    _, exact = gradients(copy_in(model, torch.float64), inputs)
    _, stock = gradients(copy.deepcopy(model), inputs)
    name = next(name for name, p in model.named_parameters() if p is weight_of(model))
    floor = 4 * torch.finfo(torch.float32).eps * exact[name].abs().max().item()
    return exact[name], 2 * max_error(stock[name], exact[name]) + floor


@pytest.mark.parametrize("head", TIED)
def test_the_gradients_meet_and_are_right(head, ties):
    model = build(head)
    inputs = batch_of(model, padding="right")
    exact, allowed = bound(model, inputs)
    fasttune.patch(model)
    gradients(model, inputs)
    assert ties == [(True, True)]
    loss_of(model, inputs).backward()
    assert max_error(weight_of(model).grad, exact) <= allowed


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_gradient_accumulation_hooks_and_token_types(head, ties):
    model = build(head)
    inputs = batch_of(model, padding="right")
    if head == "GPT2LMHeadModel":
        inputs["token_type_ids"] = inputs["input_ids"].flip(0)  # looked up in the same table
    exact, allowed = bound(model, inputs)
    fasttune.patch(model)
    seen = []
    handles = [
        weight_of(model).register_hook(lambda grad: seen.append(grad.clone())),
        weight_of(model).register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone())),
    ]
    for _ in range(3):
        model(**inputs).loss.backward()
    assert len(ties) == 3
    assert len(seen) == 6  # each kind once a step, with the whole gradient
    assert max_error(seen[0], exact) <= allowed
    assert max_error(seen[1], exact) <= allowed
    assert max_error(weight_of(model).grad, 3 * exact) <= 3 * allowed
    assert not weight_of(model).grad.is_sparse
    for handle in handles:
        handle.remove()


def test_frozen_untied_evaluated_or_left_unread(ties):
    model = fasttune.patch(build("GPT2LMHeadModel"))
    inputs = batch_of(model)
    weight_of(model).requires_grad_(False)
    model(**inputs).loss.backward()
    assert weight_of(model).grad is None
    assert ties == []
    weight_of(model).requires_grad_(True)
    untied = fasttune.patch(build("GPT2LMHeadModel", tie_word_embeddings=False))
    untied(**inputs).loss.backward()
    assert ties == []
    model.eval()(**inputs).loss.backward()
    assert ties == []
    hidden = model.train()(**inputs, output_hidden_states=True).hidden_states[-1]
    model.zero_grad()
    hidden.sum().backward()  # the head's share is missing
    assert ties == [(True, False)]
    assert not weight_of(model).grad.is_sparse


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*able`:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_of_layers_and_of_the_whole_model(use_reentrant):
    model = build("GPT2LMHeadModel")
    inputs = batch_of(model)
    exact, allowed = bound(model, inputs)
    fasttune.patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(**inputs, use_cache=False).loss.backward()
    assert max_error(weight_of(model).grad, exact) <= allowed
    model.gradient_checkpointing_disable()
    model.zero_grad()
    anchor = torch.zeros((), requires_grad=True)
    loss = checkpoint(lambda a: model(**inputs, use_cache=False).loss + a, anchor, use_reentrant=use_reentrant)
    loss.backward()
    assert max_error(weight_of(model).grad, exact) <= allowed


def test_retained_graphs_and_logits_read_beside_the_loss():
    model = build("BertForMaskedLM")
    inputs = batch_of(model)
    exact, allowed = bound(model, inputs)
    fasttune.patch(model)
    loss = model(**inputs).loss
    loss.backward(retain_graph=True)
    loss.backward()
    assert max_error(weight_of(model).grad, 2 * exact) <= 2 * allowed
    model.zero_grad()
    outputs = model(**inputs)
    (outputs.loss + 0 * outputs.logits.sum()).backward()
    assert max_error(weight_of(model).grad, exact) <= 2 * allowed
