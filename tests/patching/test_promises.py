"""Nothing else changes: names, files, hooks, copies, generation, checkpointing; and unpatch restores every bit."""

import copy
import filecmp
import io
import pickle
from dataclasses import replace

import pytest
import torch
from models import HEADS, batch_of, build, gradients, loss_of
from torch import nn

import fasttune

SOME = [
    "GPT2LMHeadModel",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "RobertaForMaskedLM",
    "ElectraForMaskedLM",
]


def snapshot(model):
    """All that a user can see of a model, its tensors aside."""
    return {
        "state": {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict().items()},
        "modules": [(name, type(module).__name__) for name, module in model.named_modules()],
        "parameters": [(name, id(p)) for name, p in model.named_parameters()],
        "text": repr(model),
        "config": model.config.to_json_string(),
    }


@pytest.mark.parametrize("head", HEADS)
def test_names_and_state_stay(head):
    model = build(head)
    before = snapshot(model)
    assert fasttune.patch(model) is model
    assert snapshot(model) == before
    loss_of(model, batch_of(model)).backward()
    assert any(row.runs for row in fasttune.report(model).rows)


@pytest.mark.parametrize("head", SOME)
def test_unpatch_restores_every_bit(head):
    model = build(head, dropout=0.1)
    config, classes = model.config, [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    inputs = batch_of(model, padding="right")

    def run():
        torch.manual_seed(4)
        return gradients(model, inputs)

    loss, grads = run()
    fasttune.patch(model)
    patched_loss, _ = run()
    assert not torch.equal(patched_loss, loss)  # other dropout masks: the patch was really there
    assert fasttune.unpatch(model) is model
    again, grads_again = run()
    assert torch.equal(again, loss)
    assert all(torch.equal(grads_again[name], grads[name]) for name in grads)
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(module.config is config for module in model.modules() if "config" in vars(module))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_patched_is_undone_also_after_an_error():
    model = build("GPT2LMHeadModel")

    def fails():
        with fasttune.patched(model, loss=False) as same:
            assert same is model
            assert fasttune.report(model).rows
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert fasttune.report(model).rows == ()


def test_patching_twice_takes_the_new_options():
    model = build("BertForMaskedLM")
    original = model.config
    fasttune.patch(model)
    first = str(fasttune.report(model))
    assert str(fasttune.report(fasttune.patch(model))) == first
    fasttune.patch(model, attention=False, norms=False)
    assert model.config is original
    notes = {row.stock: row.note for row in fasttune.report(model).rows}
    assert notes["BertSelfAttention"] == "attention=False"
    assert notes["BertOutput"] == "norms=False"
    fasttune.unpatch(fasttune.unpatch(model))
    assert model.config is original


@pytest.mark.parametrize("head", SOME)
def test_saved_files_are_stocks(head, tmp_path):
    model = build(head)
    loss_of(model, batch_of(model))  # classifiers write problem_type into the config
    model.save_pretrained(tmp_path / "stock")
    fasttune.patch(model)
    loss_of(model, batch_of(model))
    model.save_pretrained(tmp_path / "patched")
    files = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "patched").iterdir())
    assert filecmp.cmpfiles(tmp_path / "stock", tmp_path / "patched", files, shallow=False)[0] == files
    again = type(model).from_pretrained(tmp_path / "patched")
    assert fasttune.report(again).rows == ()
    assert again.config._attn_implementation == "sdpa"


def test_two_models_from_one_config_do_not_affect_each_other():
    first = build("GPT2LMHeadModel")
    second = type(first)(first.config)
    inputs = batch_of(second, padding="right")
    before, state = loss_of(second, inputs), dict(vars(first.config))
    fasttune.patch(first)
    assert first.config is second.config  # as in stock; nothing is written to it
    loss_of(first, inputs).backward()
    assert dict(vars(first.config)) == state
    assert torch.equal(loss_of(second, inputs), before)
    fasttune.unpatch(first)
    assert dict(vars(first.config)) == state


@pytest.mark.parametrize("copying", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("head", SOME)
def test_copies_stay_patched_and_pickles_are_stocks(head, copying):
    model = fasttune.patch(build(head))
    inputs = batch_of(model, padding="right")
    loss, grads = gradients(model, inputs)
    if copying == "deepcopy":
        twin = copy.deepcopy(model)
    elif copying == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, buffer := io.BytesIO())
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    twin_loss, twin_grads = gradients(twin, inputs)
    if copying == "deepcopy":
        assert torch.equal(twin_loss, loss)
        assert all(torch.equal(twin_grads[name], grads[name]) for name in grads)
        ours, theirs = ([replace(row, calls=0) for row in fasttune.report(m).rows] for m in (twin, model))
        assert ours == theirs
        assert {type(m) for m in twin.modules()} == {type(m) for m in model.modules()}
    else:  # a pickle holds the stock model, and loads where there is no fasttune
        torch.testing.assert_close(twin_loss, loss, rtol=1e-5, atol=1e-6)
        assert not [m for m in twin.modules() if type(m).__module__.startswith("fasttune")]
    fasttune.unpatch(twin)
    assert fasttune.report(twin).rows == ()
    assert twin.config._attn_implementation == "sdpa"
    assert torch.equal(gradients(model, inputs)[0], loss)  # the original is still patched


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_hooks_fire_and_see_what_stock_shows(head):
    inputs = batch_of(build(head))
    seen = {}

    def run(model, name, kind):
        module, calls = model.get_submodule(name), []
        if kind == "forward":
            handle = module.register_forward_hook(lambda m, i, o: calls.append(o))
        elif kind == "pre":
            handle = module.register_forward_pre_hook(lambda m, i: calls.append(i[0]))
        else:
            handle = module.register_full_backward_hook(lambda m, i, o: calls.append(o[0]))
        loss = loss_of(model, inputs)
        loss.backward()
        handle.remove()
        return loss, [c[0] if isinstance(c, tuple) else c for c in calls]

    stock, ours = build(head), fasttune.patch(build(head))
    containers = ("", "transformer", "bert", "transformer.h", "bert.encoder", "bert.encoder.layer")
    for name in [name for name, _ in stock.named_modules() if name not in containers]:
        for kind in ("forward", "pre") if "dropout" in name or "drop" in name else ("forward", "backward"):
            if kind == "backward" and ("embeddings" in name or "wte" in name or "wpe" in name):
                continue  # stock's own backward hooks need inputs with gradients
            (loss, expected), (our_loss, found) = run(stock, name, kind), run(ours, name, kind)
            assert len(found) == len(expected), (name, kind)
            torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a + 0, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
            seen[name, kind] = len(found)
    assert sum(seen.values()) > 40


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM", "BertModel"])
@pytest.mark.parametrize("where", ["argument", "config"])
def test_hidden_states(head, where):
    stock, ours = build(head), build(head)
    if where == "config":
        stock.config.output_hidden_states = ours.config.output_hidden_states = True
    fasttune.patch(ours)
    inputs = batch_of(stock) | ({"output_hidden_states": True} if where == "argument" else {})
    expected, found = stock(**inputs).hidden_states, ours(**inputs).hidden_states
    assert len(found) == len(expected) == 3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM", "BertLMHeadModel"])
def test_attention_weights(head, padding, attention):
    stock, ours = (build(head, _attn_implementation=attention) for _ in range(2))
    inputs = batch_of(stock, padding=padding)
    fasttune.patch(ours)
    plain = ours(**inputs)
    expected, found = stock(**inputs, output_attentions=True), ours(**inputs, output_attentions=True)
    assert len(found.attentions) == len(expected.attentions) == (2 if attention == "eager" else 0)
    for a, b in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(ours(**inputs).loss, plain.loss, rtol=0, atol=0)  # and it is fused again afterwards


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM", "BertForQuestionAnswering"])
@pytest.mark.parametrize("padding", [None, "right", "left"])
def test_evaluation(head, padding):
    stock, ours = build(head, dropout=0.1).eval(), fasttune.patch(build(head, dropout=0.1)).eval()
    inputs = batch_of(stock, padding=padding)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            expected, found = stock(**inputs), ours(**inputs)
        for a, b in zip(found.to_tuple(), expected.to_tuple(), strict=True):
            if isinstance(b, torch.Tensor):
                assert type(a) is torch.Tensor
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertLMHeadModel", "RobertaForCausalLM"])
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_generate(head, cache, training):
    if head != "GPT2LMHeadModel" and (training or cache == "static"):
        pytest.skip("one family is enough")
    stock, ours = build(head).train(training), fasttune.patch(build(head)).train(training)
    inputs = batch_of(stock, padding="left")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": cache is not None, "pad_token_id": 1}
    if cache == "static":
        options["cache_implementation"] = "static"
    expected, found = (
        model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True) for model in (stock, ours)
    )
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertLMHeadModel"])
def test_cross_attention(head):
    stock, ours = (build(head, add_cross_attention=True, is_decoder=True) for _ in range(2))
    fasttune.patch(ours)
    inputs = batch_of(stock)
    for length in (9, 13):  # 13 is also the decoder's length: the encoder's mask must not be taken for its own
        encoder = torch.randn(3, length, 64, generator=torch.Generator().manual_seed(0))
        mask = torch.ones(3, length, dtype=torch.long)
        mask[1, 5:] = 0
        for more in ({}, {"encoder_attention_mask": mask}):
            (loss, grads), (our_loss, our_grads) = (
                gradients(model, inputs | {"encoder_hidden_states": encoder} | more) for model in (stock, ours)
            )
            torch.testing.assert_close(our_loss, loss)
            for name in grads:
                torch.testing.assert_close(our_grads[name], grads[name], rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_encoder_decoder_of_two_patched_models():
    import transformers

    def make():
        torch.manual_seed(0)
        return transformers.EncoderDecoderModel(
            encoder=build("BertModel"), decoder=build("BertLMHeadModel", add_cross_attention=True, is_decoder=True)
        )

    stock, ours = make(), make()
    stock.config.decoder_start_token_id = ours.config.decoder_start_token_id = 2
    stock.config.pad_token_id = ours.config.pad_token_id = 1
    fasttune.patch(ours)
    inputs = {k: v for k, v in batch_of(build("BertLMHeadModel"), padding="right").items() if k != "token_type_ids"}
    (loss, grads), (our_loss, our_grads) = gradients(stock, inputs), gradients(ours, inputs)
    torch.testing.assert_close(our_loss, loss)
    for name in grads:
        torch.testing.assert_close(our_grads[name], grads[name], rtol=1e-3, atol=1e-5)
    # Cross-attention asks for the encoder states of real tokens alone.
    assert "(reads)" not in str(fasttune.report(ours))
    fasttune.unpatch(ours)
    assert torch.equal(gradients(ours, inputs)[0], loss)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_regenerates_the_dropout(head, reentrant):
    model = fasttune.patch(build(head, dropout=0.1), trim=False)  # under checkpointing the last layer is not trimmed
    inputs = batch_of(model, padding="right") | ({"use_cache": False} if head.startswith("GPT2") else {})

    def run():
        torch.manual_seed(11)
        return gradients(model, inputs)

    model.enable_input_require_grads()  # reentrant checkpoints need it; a hook, which the embeddings step aside for
    calls = []
    layer = model.transformer.h[0].mlp.c_proj if head.startswith("GPT2") else model.bert.encoder.layer[0].output.dense
    handle = layer.register_forward_hook(lambda *_: calls.append(1))  # in both runs: padding stays in for a hook
    loss, grads = run()
    calls.clear()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, grads_again = run()
    handle.remove()
    assert len(calls) == 2  # forward, and once more in backward
    # The first pass of a reentrant checkpoint takes no promise: the same masks and numbers, in products of other sizes.
    torch.testing.assert_close(again, loss, rtol=1e-6 if reentrant else 0, atol=0)
    for name in grads:
        scale = grads[name].abs().max().item()
        floor = 1e-6 * scale + 1e-8 if reentrant else 0
        torch.testing.assert_close(grads_again[name], grads[name], rtol=0, atol=floor)


@pytest.mark.parametrize("head", SOME)
def test_manual_seed_reproduces_training(head):
    def train():
        torch.manual_seed(0)
        model = fasttune.patch(build(head, dropout=0.1))
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        torch.manual_seed(1)
        for step in range(4):
            loss = loss_of(model, batch_of(model, padding="right", seed=step % 2))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    first = train()
    assert train() == first
    assert len(set(first)) == 4


def test_saved_generator_state_replays_a_step():
    model = fasttune.patch(build("GPT2LMHeadModel", dropout=0.1))
    inputs = batch_of(model)
    state = torch.get_rng_state()
    loss, other = loss_of(model, inputs), loss_of(model, inputs)
    torch.set_rng_state(state)
    assert torch.equal(loss_of(model, inputs), loss)
    assert not torch.equal(other, loss)


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForSequenceClassification"])
@pytest.mark.parametrize("frozen", ["embeddings", "head", "all but head", "everything"])
def test_frozen_parameters(head, frozen):
    def freeze(model):
        base = model.base_model
        for name, parameter in model.named_parameters():
            is_embedding = "wte" in name or "wpe" in name or "embeddings" in name
            is_head = not name.startswith(base.base_model_prefix)
            parameter.requires_grad_(
                {
                    "embeddings": not is_embedding,
                    "head": not is_head and "wte" not in name,
                    "all but head": is_head or "wte" in name,
                    "everything": False,
                }[frozen]
            )
        return model

    stock, ours = freeze(build(head)), fasttune.patch(freeze(build(head)))
    inputs = batch_of(stock)
    if frozen == "everything":
        assert not loss_of(ours, inputs).requires_grad
        torch.testing.assert_close(loss_of(ours, inputs), loss_of(stock, inputs))
        return
    (loss, grads), (our_loss, our_grads) = gradients(stock, inputs), gradients(ours, inputs)
    torch.testing.assert_close(our_loss, loss)
    assert our_grads.keys() == grads.keys()
    for name in grads:
        torch.testing.assert_close(our_grads[name], grads[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForTokenClassification", "BertForQuestionAnswering"])
def test_labels_on_padding_keep_it_in(head):
    """Whoever reads rows at padding gets what stock computes there."""
    stock, ours = build(head), fasttune.patch(build(head))
    inputs = batch_of(stock, padding="right")
    if "labels" in inputs:
        inputs["labels"] = inputs["labels"].clamp(min=0)
    (loss, grads), (our_loss, our_grads) = gradients(stock, inputs), gradients(ours, inputs)
    torch.testing.assert_close(our_loss, loss)
    for name in grads:
        torch.testing.assert_close(our_grads[name], grads[name], rtol=1e-3, atol=1e-5)
    packing = next(row for row in fasttune.report(ours).rows if row.modules == "(packing)")
    assert packing.calls > 0  # it left all the same: what is read there is computed afterwards


def test_four_dimensional_masks_and_packed_position_ids():
    stock, ours = build("GPT2LMHeadModel"), fasttune.patch(build("GPT2LMHeadModel"))
    inputs = batch_of(stock)
    mask = torch.rand(3, 1, 13, 13) > 0.4
    mask |= torch.eye(13, dtype=torch.bool)
    positions = torch.cat((torch.arange(5), torch.arange(8)))[None]
    for more in ({"attention_mask": mask}, {"position_ids": positions.expand(3, -1), "use_cache": False}):
        (loss, grads), (our_loss, our_grads) = (gradients(model, inputs | more) for model in (stock, ours))
        torch.testing.assert_close(our_loss, loss)
        for name in grads:
            torch.testing.assert_close(our_grads[name], grads[name], rtol=1e-3, atol=1e-5)
    assert "a mask of another kind" in " ".join(row.note for row in fasttune.report(ours).rows)


def test_input_embeddings_may_be_given():
    for head in ("GPT2LMHeadModel", "BertForMaskedLM", "RobertaForMaskedLM"):
        stock, ours = build(head), fasttune.patch(build(head))
        inputs = batch_of(stock)
        inputs["inputs_embeds"] = torch.randn(*inputs.pop("input_ids").shape, 64)
        torch.testing.assert_close(loss_of(ours, inputs), loss_of(stock, inputs))


def test_modules_exchanged_after_patching_are_seen():
    model = fasttune.patch(build("GPT2LMHeadModel"))
    model.resize_token_embeddings(120)
    loss_of(model, batch_of(model)).backward()
    assert model.transformer.wte.weight.grad.shape == (120, 64)
    model.lm_head = nn.Linear(64, 120, bias=False)
    rows = {row.modules: row for row in fasttune.report(model).rows}
    assert "put in after patching" in rows["lm_head"].note
    loss_of(model, batch_of(model)).backward()
    fasttune.patch(model)
    assert {row.modules: row for row in fasttune.report(model).rows}["lm_head"].runs


def test_modules_that_are_not_exactly_stock_are_left_alone():
    class Special(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) * 2

    stock = build("BertForSequenceClassification")
    special = Special(64)
    stock.bert.encoder.layer[0].output.LayerNorm = special
    replaced = stock.bert.encoder.layer[1].intermediate
    ours = copy.deepcopy(stock)
    replaced = ours.bert.encoder.layer[1].intermediate
    replaced.forward = lambda x, f=replaced.forward: f(x)
    fasttune.patch(ours)
    inputs = batch_of(stock)
    torch.testing.assert_close(loss_of(ours, inputs), loss_of(stock, inputs))
    text = " ".join(row.note for row in fasttune.report(ours).rows)
    assert "forward was replaced" in text
    assert "Special" in text


def test_wrapped_models_are_found_inside():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = build("BertModel")
            self.head = nn.Linear(64, 2)

        def forward(self, **inputs):
            return self.head(self.bert(**inputs).last_hidden_state[:, 0])

    model = Classifier()
    inputs = batch_of(model.bert, padding="right")
    expected = model(**inputs)
    fasttune.patch(model)
    torch.testing.assert_close(model(**inputs), expected)
    assert fasttune.report(model).rows
    fasttune.unpatch(model)
    assert torch.equal(model(**inputs), expected)


def test_unsupported_models_and_bad_options_are_named():
    with pytest.raises(fasttune.UnsupportedModelError, match="does not know Sequential.*GPT2LMHeadModel.*ElectraModel"):
        fasttune.patch(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="model is a str"):
        fasttune.patch("bert")
    model = build("BertModel")
    with pytest.raises(TypeError, match="norms is 1; expected True or False"):
        fasttune.patch(model, norms=1)
    with pytest.raises(TypeError, match="packing is 'yes'"):
        fasttune.patch(model, packing="yes")
    with pytest.raises(ValueError, match="backend is 'gpu'; expected one of cpp"):
        fasttune.patch(model, backend="gpu")
    with pytest.raises(RuntimeError, match="backend='cuda' was asked for attention, but"):
        fasttune.patch(model, backend="cuda")
    assert fasttune.report(model).rows == ()


def test_the_torch_backend_on_request():
    stock, ours = build("GPT2LMHeadModel"), fasttune.patch(build("GPT2LMHeadModel"), backend="torch")
    inputs = batch_of(stock, padding="right")
    torch.testing.assert_close(loss_of(ours, inputs), loss_of(stock, inputs))
    assert {row.backend for row in fasttune.report(ours).rows if row.backend} == {"torch"}
