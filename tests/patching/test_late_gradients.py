"""Gradients of hidden states, asked for after they were read: by the next layer, a pooler, a head, a loss."""

import copy
import gc
import weakref

import pytest
import torch
from models import batch_of, build

import fasttune
from fasttune.patching.promises.origins import Origins
from fasttune.patching.promises.source import Shelf, TensorRows
from fasttune.patching.promises.tensor import PromisedRows

HEADS = ["BertModel", "BertForSequenceClassification", "GPT2Model", "GPT2LMHeadModel", "RobertaForMaskedLM"]
ROUNDING = 2**7 * torch.finfo(torch.float32).eps  # of sums over the features and classes of a tiny model


def last(outputs):
    return outputs.hidden_states[-1]


READERS = {
    "the head": lambda outputs: outputs[0],
    "its rows": lambda outputs: last(outputs)[:, 0],
    "all rows": lambda outputs: last(outputs).float().sum(-1),
    "an earlier layer too": lambda outputs: torch.cat([outputs[0].reshape(-1), outputs.hidden_states[1].reshape(-1)]),
    "rows of an earlier one": lambda outputs: torch.cat(
        [outputs[0].reshape(-1), outputs.hidden_states[1][:, ::2].reshape(-1)]
    ),
}


def retained(outputs, _):
    for x in outputs.hidden_states:
        x.retain_grad()
    return lambda: [x.grad for x in outputs.hidden_states]


def by_autograd(outputs, loss):
    return lambda: torch.autograd.grad(loss, outputs.hidden_states, retain_graph=True, allow_unused=True)


def both(stock, padding, run):
    ours = fasttune.patch(copy.deepcopy(stock))
    inputs = batch_of(stock, padding=padding)
    inputs.pop("labels", None)
    found = []
    for model in (ours, stock):
        outputs = model(**inputs, output_hidden_states=True)
        found.append([*run(outputs), *(p.grad for p in model.parameters())])
    scale = max(x.abs().max().item() for x in found[1] if x is not None)
    for a, b in zip(*found, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b, rtol=0.0, atol=ROUNDING * scale)


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("ask", [retained, by_autograd])
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("head", HEADS)
def test_as_in_stock(head, reader, ask, padding):
    def run(outputs):
        loss = (READERS[reader](outputs).float() ** 2).sum()
        grads = ask(outputs, loss)
        found = grads() if ask is by_autograd else None
        loss.backward()
        return grads() if found is None else found

    both(build(head), padding, run)


@pytest.mark.parametrize("first", ["asked", "read"])
def test_rows_that_are_read_after_the_question(first):
    def run(outputs):
        x, y = outputs.hidden_states[1:3]
        pooled = x[:, 0] * 1.0
        if first == "asked":
            x.retain_grad()
        mean = x.mean(1)
        x.retain_grad()
        (pooled * mean * y[:, 1]).sum().backward()
        return [x.grad]

    both(build("BertModel"), "right", run)


@pytest.mark.parametrize("factor", [None, 3.0])
@pytest.mark.parametrize("head", ["BertModel", "GPT2Model"])
def test_a_hook_on_an_earlier_layer(head, factor):
    """Which the next layer has read, and nobody else: the hook sees all of the gradient, once, and may change it."""

    def run(outputs):
        seen = []

        def hook(grad):
            seen.append(grad.clone())
            return None if factor is None else factor * grad

        outputs.hidden_states[1].register_hook(hook)
        (last(outputs)[:, 0] ** 2).sum().backward()
        assert len(seen) == 1
        return seen

    both(build(head), "right", run)


@pytest.mark.parametrize("reader", [lambda x: x[:, 0], lambda x: x.mean(1)])
def test_a_hook_that_would_see_a_part_is_refused(reader):
    model = fasttune.patch(build("BertModel"))
    inputs = batch_of(model, padding="right")
    outputs = model(**inputs, output_hidden_states=True)
    hidden = outputs.hidden_states[1]
    hidden.register_hook(lambda grad: grad)
    loss = reader(hidden).sum() + last(outputs)[:, 0].sum()
    with pytest.raises(RuntimeError, match="asked for after something was made of them"):
        loss.backward()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("removed", [False, True])
def test_a_hook_beside_a_pooler_that_nobody_reads(late, removed):
    """In each of two backward passes."""

    def run(outputs):
        seen = []
        hidden = outputs.last_hidden_state
        if late:
            first = (hidden[:, 1] ** 2).sum()
        handle = hidden.register_hook(lambda grad: seen.append(grad.clone()))
        loss = first if late else (hidden.mean(1) ** 2).sum()
        loss.backward(retain_graph=True)
        if removed:
            handle.remove()
        loss.backward()
        assert len(seen) == 2 - removed
        return seen

    both(build("BertModel"), "right", run)


def test_a_hook_cannot_give_rows_a_gradient_that_nobody_computed():
    model = fasttune.patch(build("BertModel"))
    outputs = model(**batch_of(model, padding="right"), output_hidden_states=True)
    outputs.hidden_states[1].register_hook(torch.ones_like)
    with pytest.raises(RuntimeError, match="asked for after something was made of them"):
        last(outputs)[:, 0].sum().backward()


def test_a_view_of_which_something_was_made():
    model = fasttune.patch(build("BertModel"))
    hidden = model(**batch_of(model, padding="right")).last_hidden_state
    first = hidden[:, :3]
    first[:, 1].sum()
    with pytest.raises(RuntimeError, match="asked for after something was made of them"):
        first.retain_grad()


def test_a_view_beside_which_the_whole_was_read():
    def run(outputs):
        whole = last(outputs)
        flat = whole.view(-1, whole.shape[-1])
        value = (flat[2:5] ** 2).sum() + whole[:, 0].sum()
        try:
            flat.retain_grad()
        except RuntimeError:
            flat = flat.detach().requires_grad_()
            (flat[2:5] ** 2).sum().backward(inputs=[flat])
        value.backward()
        return [flat.grad]

    both(build("BertModel"), "right", run)


def test_the_question_keeps_nothing_alive():
    model = fasttune.patch(build("BertModel"))
    gc.disable()
    try:
        outputs = model(**batch_of(model, padding="right"), output_hidden_states=True)
        loss = last(outputs)[:, 0].sum()
        outputs.hidden_states[1].retain_grad()
        state = outputs.hidden_states[1].state
        rows = [weakref.ref(state), weakref.ref(state.source), weakref.ref(state.source.origins.alive()[0][1])]
        del state
        loss.backward()
        del outputs, loss
        assert [reference() for reference in rows] == [None] * 3
    finally:
        gc.enable()


def test_rows_that_nobody_has_any_more():
    """A gradient will pass them as long as the graph is there."""
    origins, leaf = Origins(), torch.ones(2, 3, requires_grad=True)
    rows = 2.0 * leaf
    origins.add(None, rows)
    total = rows.sum()
    del rows
    with pytest.raises(RuntimeError, match="asked for after something was made of them"):
        origins.ask(Shelf())
    del total
    origins.ask(Shelf())


@pytest.mark.parametrize("clear", ["none", "zero"])
def test_a_gradient_that_was_cleared_starts_anew(clear):
    def run(outputs):
        hidden = outputs.hidden_states[1]
        first, second = (last(outputs)[:, 1] ** 2).sum(), hidden.mean(1).sum()
        hidden.retain_grad()
        first.backward(retain_graph=True)
        seen = hidden.grad.clone()
        if clear == "none":
            hidden.grad = None
        else:
            hidden.grad.zero_()
        second.backward()
        return [seen, hidden.grad]

    both(build("BertModel"), "right", run)


def test_two_parts_of_a_gradient_in_passes_of_their_own():
    """A hook that sees one after the other cannot tell them from two losses."""
    model = fasttune.patch(build("BertModel"))
    outputs = model(**batch_of(model, padding="right"), output_hidden_states=True)
    hidden = outputs.hidden_states[1]
    first = last(outputs)[:, 1].sum()
    hidden.register_hook(lambda grad: grad)
    second = hidden[:, 0].sum()
    first.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="asked for after something was made of them"):
        second.backward()


def test_a_promise_of_rows_that_are_there():
    hidden = torch.randn(2, 3, 4, requires_grad=True) * 1.0
    promised = PromisedRows.of(TensorRows(hidden), (2, 3))
    total = (promised[:, 1] ** 2).sum()
    with pytest.raises(RuntimeError, match="asked for after something was made of them"):
        promised.retain_grad()
    total.backward()


def test_what_is_made_of_rows_without_gradients_wants_none():
    model = fasttune.patch(build("BertModel"))
    with torch.no_grad():
        hidden = model(**batch_of(model, padding="right")).last_hidden_state
    assert isinstance(hidden, PromisedRows)
    assert not torch.nn.functional.gelu(hidden).requires_grad
    assert not (torch.nn.functional.gelu(hidden)[:, 1] * 1.0).requires_grad
