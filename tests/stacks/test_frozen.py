"""Frozen parts: right, and without the work that frozen weights spare; counted in operator calls, never timed.

What a step has to compute is told by a stock twin: a linear layer's input gradient where its input requires one, its
weight gradient where its weight does. The sum of these products, the norms', activations' and tables' gradients and the
attention layers that run backward are compared with what the patched model really calls.
"""

import copy
from collections import Counter

import pytest
import torch
from models import batch_of, build, loss_of
from runs import HEADS, assert_same_run, batches, exact_run, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import fasttune


def blocks_of(model):
    base = model.base_model
    return base.h if hasattr(base, "h") else base.encoder.layer


def embeddings_of(model):
    base = model.base_model
    return [base.wte, base.wpe] if hasattr(base, "wte") else [base.embeddings]


def head_of(model):
    """Parameters outside the encoder; the pooler counts as head, a tied table as embedding."""
    tables = {id(p) for part in embeddings_of(model) for p in part.parameters()}
    inside = [
        p for part in (*blocks_of(model), getattr(model.base_model, "ln_f", nn.Identity())) for p in part.parameters()
    ]
    return [p for p in model.parameters() if id(p) not in tables | {id(q) for q in inside}]


def _only(model, *trainable):
    model.requires_grad_(False)
    for part in trainable:
        for p in part.parameters() if isinstance(part, nn.Module) else part:
            p.requires_grad_(True)


FREEZE = {
    "nothing": lambda model: None,
    "embeddings": lambda model: [part.requires_grad_(False) for part in embeddings_of(model)],
    "first layer": lambda model: [part.requires_grad_(False) for part in (*embeddings_of(model), blocks_of(model)[0])],
    "last layer": lambda model: blocks_of(model)[-1].requires_grad_(False),
    "all but the last layer and the head": lambda model: _only(model, blocks_of(model)[-1], head_of(model)),
    "all but the head": lambda model: _only(model, head_of(model)),
    "head": lambda model: [p.requires_grad_(False) for p in head_of(model)],
    "all but biases": lambda model: _only(model, [p for n, p in model.named_parameters() if n.endswith("bias")]),
    "all but norms": lambda model: _only(
        model, [p for n, p in model.named_parameters() if "LayerNorm" in n or ".ln_" in n]
    ),
    "all but position embeddings": lambda model: _only(
        model, [p for n, p in model.named_parameters() if "position_embeddings" in n or "wpe" in n]
    ),
}


def frozen(head, freeze):
    model = build(head)
    FREEZE[freeze](model)
    return model


def trains_something(model):
    return any(p.requires_grad for p in model.parameters())


def full_batch(model):
    """Every row labelled, so that the head in front of a vocabulary computes all of them."""
    inputs = batch_of(model)
    if "MaskedLM" in type(model).__name__:
        inputs["labels"] = inputs["input_ids"].clone()
    return inputs


class Calls(TorchDispatchMode):
    """Every operator call as (name, {argument: value})."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = [argument.name for argument in func._schema.arguments]
        self.seen.append((func.overloadpacket.__name__, dict(zip(names, args, strict=False)) | (kwargs or {})))
        return func(*args, **(kwargs or {}))


def calls_of(model, inputs, loss_of=loss_of):
    """(calls of the forward, calls of the backward)."""
    with Calls() as calls:
        loss = loss_of(model, inputs)
        forward = len(calls.seen)
        loss.backward()
    model.zero_grad()
    return calls.seen[:forward], calls.seen[forward:]


def products(calls):
    """Multiplications in the plain matrix products among calls."""
    total = 0
    for name, arguments in calls:
        if name in ("mm", "addmm"):
            a, b = (arguments["self"], arguments["mat2"]) if name == "mm" else (arguments["mat1"], arguments["mat2"])
            total += a.shape[0] * a.shape[1] * b.shape[1]
    return total


def needed_work(model, inputs, loss_of=loss_of):
    """What backward of a stock model cannot do without: multiplications of linear layers except the vocabulary's, and
    gradients of parameters by kind."""
    needed = Counter()
    handles = []

    def note(name, module, args):
        x, weight = args[0], module.weight
        if weight.shape[0] != 101 or isinstance(module, Conv1D):
            found = x.numel() // x.shape[-1] * weight.numel() * (int(x.requires_grad) + int(weight.requires_grad))
            needed["products"] += found
            needed["score"] += found if name.endswith("score") else 0
        if name.endswith(("query", "c_attn")):
            bias = module.bias is not None and module.bias.requires_grad
            needed["attention"] += bool(x.requires_grad or weight.requires_grad or bias)

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: note(name, m, args)))
        if isinstance(module, nn.Embedding):  # called twice where GPT-2 looks up token types in its word table
            handles.append(
                module.register_forward_pre_hook(lambda m, args: needed.update(tables=int(m.weight.requires_grad)))
            )
    loss_of(model, inputs)
    for handle in handles:
        handle.remove()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            needed["norm weights"] += module.weight.requires_grad
            needed["norm biases"] += module.bias.requires_grad
    for name, module in model.named_modules():
        if name.endswith(("c_fc", "intermediate.dense")) and type(module) in (nn.Linear, Conv1D):
            needed["activation biases"] += module.bias.requires_grad
    return needed


def assert_work(done, needed):
    """Equal, but that GPT-2's classifier may go with its loss, in one operator."""
    score = needed.pop("score", 0)
    assert 0 <= needed.pop("products") - done.pop("products") <= score
    assert {kind: done[kind] for kind in needed} == dict(needed)


def work_done(backward):
    done = Counter()
    done["products"] = products(backward)
    for name, arguments in backward:
        norm = name in ("layer_norm_backward", "gelu_layer_norm_backward")
        done["attention"] += name.startswith("attention") and name.endswith("backward")
        done["norm weights"] += norm and arguments["need_dweight"]
        done["norm biases"] += norm and arguments["need_dbias"]
        done["activation biases"] += name == "bias_activation_backward" and arguments["need_dbias"]
        done["tables"] += name == "embedding_gradient" or "sparse_coo_tensor_with" in name  # sparse where it is tied
    return done


@pytest.mark.parametrize("freeze", FREEZE)
@pytest.mark.parametrize("head", HEADS)
def test_losses_and_gradients(head, freeze):
    model, data = frozen(head, freeze), batches(head)
    if not trains_something(model):
        pytest.skip("nothing is left to train")
    exact, stock = exact_run(model, data), train(copy.deepcopy(model), data)
    ours = train(fasttune.patch(model), data)
    assert_same_run(ours, stock, exact)
    assert ours.gradients[0].keys() == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("freeze", FREEZE)
@pytest.mark.parametrize("head", HEADS)
def test_only_needed_work_runs_backward(head, freeze):
    model = frozen(head, freeze)
    if not trains_something(model):
        pytest.skip("nothing is left to train")
    inputs = full_batch(model)
    needed = needed_work(copy.deepcopy(model), inputs)
    _, backward = calls_of(fasttune.patch(model, packing=False, trim=False), inputs)
    done = work_done(backward)
    assert_work(done, needed)


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("freeze", FREEZE)
@pytest.mark.parametrize("head", HEADS)
def test_packing_and_trimming_add_no_work(head, freeze, padding):
    model = frozen(head, freeze)
    if not trains_something(model):
        pytest.skip("nothing is left to train")
    inputs = batch_of(model, padding=padding)
    needed = needed_work(copy.deepcopy(model), inputs)
    _, backward = calls_of(fasttune.patch(model), inputs)
    done = work_done(backward)
    assert all(done[kind] <= needed[kind] for kind in done), (done, needed)


@pytest.mark.parametrize("freeze", FREEZE)
@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_a_frozen_vocabulary_costs_no_gradient(head, freeze):
    model = frozen(head, freeze)
    if not trains_something(model):
        pytest.skip("nothing is left to train")
    forward, _ = calls_of(fasttune.patch(model), batch_of(model))
    (arguments,) = [arguments for name, arguments in forward if name == "linear_cross_entropy"]
    decoder = model.get_output_embeddings()
    below = freeze not in ("all but the head",) or head.startswith("Bert")  # BERT's head has a transform below
    assert arguments["needs_input"] == below
    assert arguments["needs_weight"] == decoder.weight.requires_grad
    assert arguments["needs_bias"] == (decoder.bias is not None and decoder.bias.requires_grad)


@pytest.mark.parametrize("freeze", FREEZE)
@pytest.mark.parametrize("head", HEADS)
def test_the_graph_ends_at_the_lowest_trainable_layer(head, freeze):
    """Its leaves are the trainable parameters and nothing else, and it keeps no more than stock's, one number for each
    row and head of attention aside, and the offsets of the sequences in each layer."""
    model = frozen(head, freeze)
    if not trains_something(model):
        pytest.skip("nothing is left to train")
    inputs = batch_of(model)
    stock_bytes, _ = _kept(copy.deepcopy(model), inputs)
    ours_bytes, loss = _kept(fasttune.patch(model), inputs)
    batch, length = inputs["input_ids"].shape
    attended, offsets = 4 * batch * length * torch.float32.itemsize, (batch + 1) * torch.int32.itemsize
    assert ours_bytes <= stock_bytes + 2 * (attended + offsets)
    leaves, seen, todo = set(), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        todo += [following for following, _ in node.next_functions]
    assert leaves == {id(p) for p in model.parameters() if p.requires_grad}


def _kept(model, inputs):
    """Bytes of the activations that autograd keeps, parameters aside, and the loss."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, inputs)
    return sum(kept.values()), loss


@pytest.mark.parametrize("head", ["GPT2Model", "BertModel"])
def test_features_of_a_frozen_encoder(head):
    """Encoder in evaluation without gradients, a head on its features: no graph, no generator, no backward inside."""
    model, inputs = build(head, dropout=0.1).eval(), batch_of(build(head), padding="right")
    classifier = nn.Linear(64, 3)

    def loss_of_features(encoder, inputs):
        with torch.no_grad():
            features = encoder(**inputs).last_hidden_state[:, 0]
        assert isinstance(features, torch.Tensor)
        assert not features.requires_grad
        return classifier.to(features.dtype)(features).logsumexp(-1).sum()

    exact = loss_of_features(copy.deepcopy(model).double(), inputs).item()
    stock = loss_of_features(model, inputs).item()
    fasttune.patch(model)
    before = torch.get_rng_state()
    forward, backward = calls_of(model, inputs, loss_of_features)
    assert torch.equal(torch.get_rng_state(), before)
    assert any(name == "layer_norm" for name, _ in forward)
    names = {name for name, _ in backward}
    assert not names & {"attention_backward", "layer_norm_backward", "bias_activation_backward", "embedding_gradient"}
    assert products(backward) == 3 * 64 * len(inputs["input_ids"])
    assert abs(loss_of_features(model, inputs).item() - exact) <= 2 * abs(stock - exact) + 1e-6 * abs(exact)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("head", HEADS)
def test_adapters_need_no_gradient_of_the_weights_they_adapt(head):
    """LoRA on queries and values: the lowest layer's adapters end the graph, keys have no gradient there."""
    peft = pytest.importorskip("peft")

    def adapted():
        names = ["c_attn"] if head.startswith("GPT2") else ["query", "value"]
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_dropout=0.0, init_lora_weights=False, target_modules=names)
        return peft.get_peft_model(build(head), config)

    inputs = full_batch(build(head))
    needed = needed_work(adapted(), inputs)
    _, backward = calls_of(fasttune.patch(adapted(), packing=False, trim=False), inputs)
    done = work_done(backward)
    assert_work(done, needed)
    assert done["tables"] == done["norm weights"] == done["activation biases"] == 0
    if head.startswith("Bert"):
        flags = [arguments["needed"] for name, arguments in backward if name == "attention_backward"]
        flags = [of_each[:3] for of_each in flags]  # behind them stand those of the terms
        assert flags == [[True, True, True], [True, False, True]]  # backward meets the upper layer first


def test_the_count_sees_a_needless_gradient():
    """The tester: a layer that is frozen, but whose weights' gradients are computed all the same."""
    model = frozen("BertForSequenceClassification", "first layer")
    inputs = batch_of(model)
    needed = needed_work(copy.deepcopy(model), inputs)
    blocks_of(model)[0].output.dense.weight.requires_grad_(True)
    _, backward = calls_of(fasttune.patch(model, packing=False, trim=False), inputs)
    done = work_done(backward)
    assert done["products"] > needed["products"]
