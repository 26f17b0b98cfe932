"""Losses that other people write on logits: the same numbers, from the labelled rows alone, each computed once."""

import copy
import gc
import weakref

import pytest
import torch
from model_parity import note_errors, settle
from models import batch_of, build, copy_in
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.trainer_pt_utils import LabelSmoother

import fasttune
from fasttune import ops
from fasttune.patching.promises.scalars import PromisedScalars
from fasttune.patching.promises.tensor import PromisedRows

HEADS = ["BertForMaskedLM", "GPT2LMHeadModel", "BertForTokenClassification"]


def chosen(logits, labels):
    """(*lead,) log-probabilities of the labels, anything where there is none."""
    return logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def smoothed(logits, labels):
    return LabelSmoother(0.1)((logits,), labels)


def nll(logits, labels):
    return F.nll_loss(F.log_softmax(logits.reshape(-1, logits.shape[-1]), dim=-1), labels.reshape(-1))


def weighted_nll(logits, labels):
    weight = torch.linspace(0.5, 2, logits.shape[-1], dtype=logits.dtype)
    flat = logits.contiguous().view(-1, logits.shape[-1])
    return F.nll_loss(torch.log_softmax(flat, 1), labels.reshape(-1), weight=weight, ignore_index=-100)


def by_sequence(logits, labels):
    """As in preference losses: a sum for each sequence."""
    mask = (labels != -100).to(logits.dtype)
    return F.logsigmoid((chosen(logits, labels) * mask).sum(1)).mean()


def mean_of_masked(logits, labels):
    return -chosen(logits, labels).masked_fill(labels == -100, 0).sum() / (labels != -100).sum()


def focal(logits, labels):
    log_p = chosen(logits, labels)
    return (-((1 - log_p.exp()) ** 2) * log_p)[labels != -100].mean()


def focal_of_losses(logits, labels):
    losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none")
    return ((1 - torch.exp(-losses)) ** 2 * losses).sum()


def with_z_loss(logits, labels):
    mask = labels != -100
    z = torch.logsumexp(logits, dim=-1)
    return mean_of_masked(logits, labels) + 1e-2 * (z[mask] ** 2).mean() + 1e-3 * z.masked_fill(~mask, 0).sum()


def chosen_minus_logsumexp(logits, labels):
    picked = torch.gather(logits, dim=-1, index=labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(picked - torch.logsumexp(logits, dim=-1))[labels != -100].mean()


def uniform(logits, labels):
    """Divergence from the uniform distribution."""
    return -F.log_softmax(logits, dim=-1).mean(-1)[labels != -100].mean()


LOSSES = {
    function.__name__: function
    for function in (
        *(smoothed, nll, weighted_nll, by_sequence, mean_of_masked, focal, focal_of_losses, with_z_loss),
        *(chosen_minus_logsumexp, uniform),
    )
}
WITHOUT_STATISTICS = ("nll", "weighted_nll", "focal_of_losses")  # these come to a cross-entropy


def of(model, inputs, name):
    """The loss, as the head's own would be shifted, and the logits."""
    labels, rest = inputs["labels"], {key: value for key, value in inputs.items() if key != "labels"}
    logits = model(**rest).logits
    read, labels = (logits[:, :-1], labels[:, 1:]) if "GPT2" in type(model).__name__ else (logits, labels)
    return LOSSES[name](read, labels), logits


def run(model, inputs, name):
    loss, _ = of(model, inputs, name)
    loss.backward()
    return {"loss": loss.detach()} | {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


# All losses under padding; the other paddings change nothing about them, so two losses stand for the rest.
PADDED = [(name, head, "right") for name in LOSSES for head in HEADS]
PADDED += [(name, head, padding) for name in ("smoothed", "nll") for head in HEADS[:2] for padding in (None, "left")]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "head", "padding"), PADDED)
def test_parity(name, head, padding):
    def draw(errors, seed):
        model = build(head, seed=seed)
        inputs = batch_of(model, padding=padding, seed=seed + 1)
        inputs["labels"][0, 2:5] = -100
        other = copy_in(model, torch.float32)
        other.set_attn_implementation("eager")
        twins = copy_in(model, torch.float64), copy.deepcopy(model), other
        exact, stock, again = (run(twin, inputs, name) for twin in twins)
        note_errors(errors, run(fasttune.patch(model), inputs, name), (stock, again), exact)

    settle(draw)


@pytest.mark.parametrize("head", HEADS[:2])
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in WITHOUT_STATISTICS])
def test_labelled_rows_are_computed_once_and_no_others(head, name, monkeypatch):
    counts, stock = [], ops.linear_log_prob

    def counting(input, *args, **kwargs):
        counts.append(input.shape[0])
        return stock(input, *args, **kwargs)

    monkeypatch.setattr(ops, "linear_log_prob", counting)
    model = fasttune.patch(build(head))
    inputs = batch_of(model, padding="right")
    inputs["labels"][0, 2:5] = -100
    labels = inputs["labels"][:, 1:] if "GPT2" in head else inputs["labels"]
    run(model, inputs, name)
    assert counts == [int((labels != -100).sum())]


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_the_logits_is_there_for_who_asks_afterwards(name):
    stock = build("BertForMaskedLM")
    ours = fasttune.patch(copy.deepcopy(stock))
    inputs = batch_of(stock, padding="right")
    found = []
    for model in (stock, ours):
        loss, logits = of(model, inputs, name)
        logits.retain_grad()
        loss.backward()
        found.append((logits.grad, model.cls.predictions.bias.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["smoothed", "focal", "with_z_loss"])
def test_a_checkpoint_around_the_loss(name, reentrant):
    stock = build("BertForMaskedLM")
    ours = fasttune.patch(copy.deepcopy(stock))
    inputs = batch_of(stock, padding="right")
    labels = inputs.pop("labels")
    found = []
    for model in (stock, ours):
        loss = checkpoint(LOSSES[name], model(**inputs).logits, labels, use_reentrant=reentrant)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def values_of(tensor):
    ours = isinstance(tensor, (PromisedRows, PromisedScalars))
    return (tensor.materialize() if ours else tensor).detach()


def rounding(dtype):
    """Of sums over the features and classes of a tiny model, some 2^7 terms."""
    return 2**7 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) if dtype != torch.bfloat16 else 2**-7


LATE = {
    "log-probabilities": lambda log_p, labels: (log_p, log_p.gather(-1, labels)),
    "a view's": lambda log_p, labels: (log_p, log_p[:, :4].gather(-1, labels[:, :4])),
    "a class's": lambda log_p, labels: (picked := log_p.gather(-1, labels), picked.masked_fill(labels < 50, 0)),
    "a class's, negative": lambda log_p, labels: (picked := log_p.gather(-1, labels), -picked),
    "scalars": lambda log_p, labels: (picked := log_p.gather(-1, labels).squeeze(-1), picked[labels[..., 0] < 50]),
}


@pytest.mark.parametrize("name", LATE)
def test_who_asks_for_a_gradient_too_late_is_told(name):
    model = fasttune.patch(build("BertForMaskedLM"))
    inputs = batch_of(model, padding="right")
    labels = inputs.pop("labels").clamp(min=0)[..., None]
    watched, _ = LATE[name](model(**inputs).logits.log_softmax(-1), labels)
    with pytest.raises(RuntimeError, match="was asked for after something was made of them"):
        watched.retain_grad()


@pytest.mark.parametrize("name", LATE)
def test_who_asks_in_time_gets_the_gradient(name):
    stock = build("BertForMaskedLM")
    ours = fasttune.patch(copy.deepcopy(stock))
    inputs = batch_of(stock, padding="right")
    labels = inputs.pop("labels").clamp(min=0)[..., None]
    grads = []
    for model in (stock, ours):
        log_p = model(**inputs).logits.log_softmax(-1)
        log_p.retain_grad()
        (LATE[name](log_p, labels)[1] ** 2).sum().backward()
        grads.append(log_p.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5 * grads[0].abs().max().item())


def test_how_a_function_is_called_changes_nothing():
    stock = build("BertForMaskedLM")
    ours = fasttune.patch(copy.deepcopy(stock))
    inputs = batch_of(stock, padding="right")
    labels = inputs.pop("labels").clamp(min=0)[..., None]

    def results(logits):
        log_p = logits.log_softmax(dim=-1)
        out = torch.empty(0)
        torch.sum(log_p.detach(), -1, out=out)
        picked = log_p.gather(dim=-1, index=labels).squeeze(-1)
        torch.gather(log_p.detach(), -1, labels, out=(gathered := torch.empty(0)))
        return (
            *(out, gathered, torch.sum(log_p, axis=-1), torch.neg(input=picked), torch.log1p(logits.relu(), out=None)),
            *(torch.mul(picked, 2.0), picked.to("cpu").double(), picked.to(torch.bfloat16), 2.0 - picked, picked**2),
            *(picked - 0.5 * picked, labels[..., 0] * picked, torch.logsumexp(input=logits, dim=(-1,))),
        )

    for a, b in zip(results(stock(**inputs).logits), results(ours(**inputs).logits), strict=True):
        assert (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad)
        torch.testing.assert_close(values_of(b), a.detach(), rtol=rounding(a.dtype), atol=1e-5)


@pytest.mark.parametrize("around", ["the call", "the loss"])
@pytest.mark.parametrize("name", ["smoothed", "mean_of_masked", "with_z_loss", "uniform", "nll"])
def test_autocast_where_the_loss_is_decides_its_dtype(name, around):
    stock = build("BertForMaskedLM")
    ours = fasttune.patch(copy.deepcopy(stock))
    inputs = batch_of(stock, padding="right")
    labels = inputs.pop("labels")
    losses = []
    for model in (stock, ours):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around == "the call"):
            logits = model(**inputs).logits
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around == "the loss"):
            losses.append(LOSSES[name](logits, labels))
    assert losses[0].dtype == losses[1].dtype
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=2e-2)


def test_log_probabilities_read_whole_are_stocks():
    stock = build("BertForMaskedLM")
    ours = fasttune.patch(copy.deepcopy(stock))
    inputs = batch_of(stock, padding="right")
    inputs.pop("labels")
    with torch.no_grad():
        expected = stock(**inputs).logits.log_softmax(-1)
    found = ours(**inputs).logits.log_softmax(-1)
    torch.testing.assert_close(found + 0, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logsumexp(-1) + 0, expected.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((-found).sum(-1) + 0, -expected.sum(-1), rtol=1e-5, atol=1e-4)


def test_an_index_out_of_range_is_torchs_error():
    model = fasttune.patch(build("BertForMaskedLM"))
    inputs = batch_of(model)
    labels = inputs.pop("labels")
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        model(**inputs).logits.log_softmax(-1).gather(-1, labels[..., None] - 1000).sum()


def test_nothing_outlives_the_step():
    model = fasttune.patch(build("GPT2LMHeadModel"))
    inputs = batch_of(model, padding="right")
    loss, logits = of(model, inputs, "smoothed")
    loss.backward()
    gone = weakref.ref(logits.state.source)
    gc.disable()
    try:
        del loss, logits
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_float32_as_stock_does(dtype):
    stock = build("BertForMaskedLM")
    ours = fasttune.patch(copy.deepcopy(stock))
    inputs = batch_of(stock, padding="right")
    found = []
    for model in (stock, ours):
        with torch.autocast("cpu", dtype=dtype):
            loss, _ = of(model, inputs, "smoothed")
        loss.backward()
        found.append(loss)
    assert found[0].dtype == found[1].dtype
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("function", [F.cross_entropy, F.nll_loss])
def test_logits_of_a_few_classes_are_computed_where_there_is_a_label(function, reduction):
    stock = build("BertForTokenClassification")
    ours = fasttune.patch(copy.deepcopy(stock))
    inputs = batch_of(stock, padding="right")
    labels = inputs.pop("labels").reshape(-1)
    weight = torch.tensor([0.5, 1.0, 2.0])
    found = []
    for model in (stock, ours):
        logits = model(**inputs).logits
        loss = function(logits.view(-1, 3), labels, weight=weight, reduction=reduction)
        logits.retain_grad()
        (loss**2).sum().backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters()), logits.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * max(1.0, a.abs().max().item()))


def test_a_token_classifiers_own_loss_leaves_padding_out():
    model = fasttune.patch(build("BertForTokenClassification"))
    model(**batch_of(model, padding="right")).loss.backward()
    assert "(reads)" not in str(fasttune.report(model))


def splade(logits, mask):
    return torch.max((logits * mask).relu().log1p(), dim=1).values


MAXIMA = {
    "relu and log1p": lambda logits, mask: splade(logits, mask),
    "no relu": lambda logits, mask: torch.max(logits * mask - 3.0 * mask, dim=1).values,
    "nothing between": lambda logits, mask: torch.max(logits * mask, dim=1).values,
    "weights for a mask": lambda logits, mask: splade(logits, mask * 0.5),
    "a negative mask": lambda logits, mask: splade(logits, -mask),
    "of a part": lambda logits, mask: splade(logits[:, 1:7], mask[:, 1:7]),
    "without a mask": lambda logits, mask: logits.relu().log1p().amax(1),
    "indices": lambda logits, mask: torch.max((logits * mask).relu(), dim=1).indices.to(logits.dtype),
    "over the classes": lambda logits, mask: torch.max((logits * mask).relu(), dim=2).values,
    "summed": lambda logits, mask: (logits * mask).relu().log1p().sum(1),
    "two labels of one row": lambda logits, mask: torch.cat(
        [logits.log_softmax(-1).gather(-1, torch.full_like(mask, n).long()) for n in (3, 70)], -1
    ).sum(1),
}


@pytest.mark.parametrize("name", MAXIMA)
def test_maxima_and_their_neighbours_are_stocks(name):
    """Logits far below zero, so that a masked token, which counts as zero, would be the largest."""
    stock = build("BertForMaskedLM")
    with torch.no_grad():
        stock.cls.predictions.bias.sub_(1.5)
    ours = fasttune.patch(copy.deepcopy(stock))
    inputs = batch_of(stock, padding="right")
    inputs.pop("labels")
    mask = inputs["attention_mask"].unsqueeze(-1).float()
    found = []
    for model in (stock, ours):
        value = MAXIMA[name](model(**inputs).logits, mask)
        if value.requires_grad:
            (value**2).sum().backward()
        found.append([value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * max(1.0, a.abs().max().item()))


@pytest.mark.parametrize("name", ["smoothed", "by_sequence", "chosen_minus_logsumexp"])
def test_weights_that_are_frozen_while_a_loss_is_read_get_their_gradient(name):
    """A promise depends on the weights that wanted a gradient when it was made, as stock's logits do."""
    found = []
    for patched in (False, True):
        model = build("BertForMaskedLM")
        inputs = batch_of(model, padding="right")
        labels = inputs.pop("labels")
        logits = (fasttune.patch(model) if patched else model)(**inputs).logits
        model.requires_grad_(False)
        loss = LOSSES[name](logits, labels)
        model.requires_grad_(True)
        loss.backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, expected in found[0].items():
        torch.testing.assert_close(found[1][key], expected, rtol=1e-4, atol=1e-6, msg=key)
