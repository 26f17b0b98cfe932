"""torch.compile of a patched model: one graph where stock gives one, with and without padding."""

import copy

import pytest
import torch
from models import batch_of, build, gradients
from runs import Run, assert_same_run

import fasttune

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_run(model, inputs, **options):
    loss, grads = gradients(torch.compile(model, **options), inputs)
    return Run([loss.item()], [{name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}])


def eager_run(model, inputs):
    loss, grads = gradients(model, inputs)
    return Run([loss.item()], [grads])


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_one_graph(head, padding):
    gpt2, model = head.startswith("GPT2"), build(head)
    if gpt2:
        model.loss_type = "ForCausalLM"  # without one stock warns, and a warning breaks the graph
    inputs = batch_of(model, padding=padding) | ({"use_cache": False} if gpt2 else {})
    exact = eager_run(copy.deepcopy(model).double(), inputs)
    options = {"backend": "aot_eager", "fullgraph": True}
    stock = compiled_run(copy.deepcopy(model), inputs, **options)
    assert_same_run(compiled_run(fasttune.patch(model), inputs, **options), stock, exact)


@pytest.mark.slow
def test_inductor():
    model = build("BertForSequenceClassification", num_hidden_layers=1)
    inputs = batch_of(model)
    exact, stock = eager_run(copy.deepcopy(model).double(), inputs), eager_run(copy.deepcopy(model), inputs)
    assert_same_run(compiled_run(fasttune.patch(model), inputs, fullgraph=True), stock, exact)
