"""Plain loops: accumulation, autocast, torch.utils.checkpoint, copies, files, threads."""

import copy
import io
import pickle
import pickletools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import build, gradients, loss_of
from oracle import max_error
from runs import HEADS, assert_same_run, batches, exact_run, sgd, train
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fasttune


@pytest.mark.parametrize("parts", [1, 3], ids=["plain", "accumulated"])
@pytest.mark.parametrize("head", HEADS)
def test_loop(head, parts):
    model, data = build(head), batches(head, parts)
    exact, stock = exact_run(model, data), train(copy.deepcopy(model), data)
    assert_same_run(train(fasttune.patch(model), data), stock, exact)


@pytest.mark.parametrize("head", HEADS)
def test_the_comparison_sees_a_wrong_gradient(head):
    """One weight's gradient off by a thousandth, in the last step alone."""
    model, data = build(head), batches(head)
    exact, stock = exact_run(model, data), train(copy.deepcopy(model), data)
    ours = train(fasttune.patch(model), data)
    name = next(name for name, grad in ours.gradients[-1].items() if name.endswith("ln_2.weight") or "query" in name)
    ours.gradients[-1][name] *= 1.001
    with pytest.raises(AssertionError, match=name):
        assert_same_run(ours, stock, exact)
    ours.gradients[-1][name] /= 1.001
    ours.losses[-1] *= 1 + 1e-4
    with pytest.raises(AssertionError, match="losses"):
        assert_same_run(ours, stock, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_autocast(head, dtype):
    def under_autocast(model, inputs):
        with torch.autocast("cpu", dtype=dtype):
            return loss_of(model, inputs)

    model, data = build(head), batches(head)
    exact, stock = exact_run(model, data), train(copy.deepcopy(model), data, loss_of=under_autocast)
    assert_same_run(train(fasttune.patch(model), data, loss_of=under_autocast), stock, exact, dtype)


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_a_whole_forward_inside_a_checkpoint(head, reentrant, trim):
    """With dropout: what is computed again is computed with the same masks."""

    def checkpointed(model, inputs):
        # A reentrant checkpoint needs an input with a gradient to be differentiated at all.
        switch = torch.ones((), requires_grad=True)
        return checkpoint(lambda one: loss_of(model, inputs) * one, switch, use_reentrant=reentrant)

    model, data = fasttune.patch(build(head, dropout=0.1), trim=trim), batches(head)
    twin = copy.deepcopy(model)
    torch.manual_seed(5)
    plain = train(model, data)
    torch.manual_seed(5)
    again = train(twin, data, loss_of=checkpointed)
    # A reentrant checkpoint first runs without gradients, and so through the logits: the loss is rounded elsewhere. In
    # the other one every layer computes all of its rows, and rows in another number are rounded elsewhere. It keeps
    # no keys either: the first row of a sequence padded left, which is read, has them computed again.
    elsewhere = not reentrant and (trim or head == "BertForSequenceClassification")
    rounding = 1e-6 if reentrant or elsewhere else 0.0
    assert again.losses == pytest.approx(plain.losses, rel=rounding, abs=0)
    for one, other in zip(again.gradients, plain.gradients, strict=True):
        assert one.keys() == other.keys()
        if elsewhere:
            largest = max(grad.abs().max().item() for grad in other.values())
            assert max(max_error(one[name], other[name]) for name in one) <= 1e-6 * largest
        else:
            assert all(torch.equal(one[name], other[name]) for name in one)


class OwnLoss(torch.autograd.Function):
    """Somebody's fused loss: it is handed the logits as they are."""

    @staticmethod
    def forward(ctx, logits, labels):
        counted = labels != -100
        truth = F.one_hot(labels * counted, logits.shape[-1])
        ctx.save_for_backward(logits.softmax(-1) - truth, counted)
        return F.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx, upstream):
        grad, counted = ctx.saved_tensors
        return grad * (counted / counted.sum() * upstream).unsqueeze(-1), None


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_a_loss_with_a_backward_of_its_own(head):
    def own_loss(model, inputs):
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        return OwnLoss.apply(logits.view(-1, logits.shape[-1]), inputs["labels"].view(-1))

    model, data = build(head), batches(head)
    exact, stock = exact_run(model, data, loss_of=own_loss), train(copy.deepcopy(model), data, loss_of=own_loss)
    ours = train(fasttune.patch(model), data, loss_of=own_loss)
    assert_same_run(ours, stock, exact)


def _restarted(how, model, folder):
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return _patched_anew(pickle.loads(pickle.dumps(model)))
    if how == "torch.save":
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        return _patched_anew(torch.load(buffer, weights_only=False))
    if how == "state_dict":
        twin = fasttune.patch(build(type(model).__name__, dropout=0.1, seed=7))
        twin.load_state_dict(model.state_dict())
        return twin
    model.save_pretrained(folder)
    return fasttune.patch(type(model).from_pretrained(folder).train())


def _patched_anew(model):
    """A pickle holds the stock model."""
    assert fasttune.report(model).rows == ()
    assert not any("fasttune" in type(module).__module__ for module in model.modules())
    return fasttune.patch(model)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict", "save_pretrained"])
@pytest.mark.parametrize("head", HEADS)
def test_training_goes_on_in_a_copy(head, how, tmp_path):
    model, data = fasttune.patch(build(head, dropout=0.1)), batches(head)
    torch.manual_seed(3)
    train(model, data[:2])
    twin = _restarted(how, model, tmp_path)
    torch.manual_seed(4)
    rest = train(model, data[2:])
    torch.manual_seed(4)
    assert train(twin, data[2:]).losses == rest.losses


@pytest.mark.parametrize("head", HEADS)
def test_a_pickle_loads_where_there_is_no_fasttune(head):
    model = fasttune.patch(build(head))
    gradients(model, batches(head)[0][0])
    words = {argument for _, argument, _ in pickletools.genops(pickle.dumps(model)) if isinstance(argument, str)}
    assert not [word for word in words if word.split(".")[0] == "fasttune"]


def test_patched_and_stock_models_in_one_process():
    """Steps of four models in turn, two of one class and config: each as if it were alone."""
    heads = ["GPT2LMHeadModel", "GPT2LMHeadModel", "BertForMaskedLM", "BertForSequenceClassification"]

    def make():
        models = [build(head) for head in heads]
        models[1] = type(models[0])(models[0].config)
        models[1].load_state_dict(build(heads[1], seed=1).state_dict())
        return [fasttune.patch(model) if i % 2 else model for i, model in enumerate(models)]

    alone = [train(model, batches(head)).losses for model, head in zip(make(), heads, strict=True)]
    models, losses = make(), [[] for _ in heads]
    optimizers = [sgd(model) for model in models]
    for step in range(len(alone[0])):
        for i, head in enumerate(heads):
            optimizers[i].zero_grad()
            loss = loss_of(models[i], batches(head)[step][0])
            loss.backward()
            optimizers[i].step()
            losses[i].append(loss.item())
    assert losses == alone


def test_threads_train_patched_and_stock_models():
    """More threads than cores, every model alone in its thread; no call mistakes another's padding for its own."""
    heads = HEADS * 2
    models = [build(head) for head in heads]
    models = [fasttune.patch(model) if i % 3 else model for i, model in enumerate(models)]
    data = [[parts[0] for parts in batches(head)] for head in heads]

    def losses(i):
        return [gradients(models[i], inputs)[0].item() for inputs in data[i]]

    alone = [losses(i) for i in range(len(models))]
    with ThreadPoolExecutor(len(models)) as pool:
        assert list(pool.map(losses, range(len(models)))) == alone
