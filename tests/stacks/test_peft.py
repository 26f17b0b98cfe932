"""PEFT: LoRA anywhere, merged and not, modules trained in full beside it, prompts; patched before and after."""

import copy
import filecmp

import pytest
import torch
from models import batch_of, build, family_of, gradients, loss_of
from oracle import max_error
from runs import Run, assert_same_run, batches, exact_run, in_other_order, train

import fasttune

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
HEADS = ["GPT2LMHeadModel", "BertForMaskedLM", "BertForSequenceClassification"]
TASKS = {"GPT2LMHeadModel": "CAUSAL_LM", "BertForMaskedLM": None, "BertForSequenceClassification": "SEQ_CLS"}
TARGETS = {
    "attention": {"GPT2": ["c_attn"], "Bert": ["query", "value"]},
    "every linear layer": {"GPT2": ["c_attn", "c_fc", "c_proj"], "Bert": ["query", "key", "value", "dense"]},
    "embeddings": {"GPT2": ["wte", "wpe"], "Bert": ["word_embeddings", "position_embeddings"]},
    "head": {"GPT2": ["lm_head"], "Bert": ["decoder", "classifier"]},
}
HEAD_MODULES = {"GPT2LMHeadModel": "lm_head", "BertForMaskedLM": "cls", "BertForSequenceClassification": "classifier"}


def adapted(head, patch, config=None, dropout=0.0, **options):
    """A PEFT model in training mode. patch: "before" or "after" PEFT, or None; the adapters' weights are random."""
    if config is None:
        # PEFT trains a classifier in full beside the adapters of its task, and then has none for it.
        task = None if options["target_modules"] == ["classifier"] else TASKS[head]
        config = peft.LoraConfig(
            r=4, lora_alpha=8, lora_dropout=dropout, init_lora_weights=False, task_type=task, **options
        )
    model = build(head, dropout)
    if patch == "before":
        fasttune.patch(model)
    torch.manual_seed(2)
    model = peft.get_peft_model(model, config).train()
    return fasttune.patch(model) if patch == "after" else model


def targets(head, where):
    names = TARGETS[where][family_of(head)]
    return [name for name in names if any(part.endswith(name) for part, _ in build(head).named_modules())]


def check(make, head, data=None):
    """`make(patch)` trained stock and patched, before and after; returns the last."""
    data = batches(head) if data is None else data
    stock = make(None)
    exact, expected = exact_run(stock, data), train(stock, data)
    again = [train(make(None), in_other_order(data, by)) for by in (1, 2)]
    for patch in ("before", "after"):
        model = make(patch)
        assert_same_run(train(model, data), expected, exact, again=again)
    return model


@pytest.mark.parametrize("where", TARGETS)
@pytest.mark.parametrize("head", HEADS)
def test_lora(head, where):
    model = check(lambda patch: adapted(head, patch, target_modules=targets(head, where)), head)
    assert any(row.runs for row in fasttune.report(model).rows)


def test_the_report_speaks_of_adapted_layers():
    rows = {}
    for patch in ("before", "after"):
        for where in ("head", "embeddings", "every linear layer"):
            names = {*targets("GPT2LMHeadModel", where), "c_attn"}
            model = adapted("GPT2LMHeadModel", patch, target_modules=sorted(names))
            loss_of(model, batches("GPT2LMHeadModel")[0][0])
            rows[patch, where] = {row.modules: row for row in fasttune.report(model).rows}
    assert "not Linear" in rows["after", "head"]["lm_head"].note
    base = rows["before", "head"]["lm_head.base_layer"]
    assert base.runs.startswith("logits on demand")
    assert base.calls == 0  # the adapter adds to its logits, so they were read
    assert "not Embedding" in rows["after", "embeddings"]["transformer.wte"].note
    for patch in ("before", "after"):
        # Adapted layers are still computed whole, and so without the module that would fuse bias and GELU.
        assert rows[patch, "every linear layer"]["transformer.h.{0-1}.mlp"].calls == 0


@pytest.mark.parametrize("head", HEADS)
def test_modules_to_save(head):
    options = {"target_modules": targets(head, "attention"), "modules_to_save": [HEAD_MODULES[head]]}
    check(lambda patch: adapted(head, patch, **options), head)


def test_a_head_copied_alone_does_not_copy_the_model_around_it():
    model = fasttune.patch(build("GPT2LMHeadModel"))
    gradients(model, batches("GPT2LMHeadModel")[0][0])
    memo = {}
    copied = copy.deepcopy(model.lm_head, memo)
    assert [value for value in memo.values() if isinstance(value, torch.nn.Module)] == [copied]
    assert [value for value in memo.values() if isinstance(value, torch.Tensor)] == [copied.weight]
    twin = copy.deepcopy(model)
    assert twin.lm_head._fasttune.settings is twin._fasttune.settings
    assert twin._fasttune.settings is not model._fasttune.settings


@pytest.mark.parametrize("where", TARGETS)
@pytest.mark.parametrize("head", HEADS)
def test_merging(head, where):
    """Merged, unmerged again, and merged for good: one loss, and the adapters' gradients after unmerging."""
    inputs = batches(head)[0][0]

    def run(patch, dtype=torch.float32):
        model = adapted(head, patch, target_modules=targets(head, where)).to(dtype)
        run = Run()
        for step in (lambda: None, model.merge_adapter, model.unmerge_adapter):
            step()
            run.losses.append(loss_of(model, inputs).item())
        run.gradients.append(gradients(model, inputs)[1])
        merged = model.merge_and_unload()
        run.losses.append(loss_of(merged, inputs).item())
        if patch:
            assert any(row.runs for row in fasttune.report(merged).rows)
        return run

    exact, stock = run(None, torch.float64), run(None)
    for patch in ("before", "after"):
        assert_same_run(run(patch), stock, exact)


@pytest.mark.parametrize("head", HEADS)
def test_adapters_on_disk(head, tmp_path):
    for patch in (None, "before", "after"):
        adapted(head, patch, target_modules=targets(head, "attention")).save_pretrained(tmp_path / str(patch))
    for patch in ("before", "after"):
        files = ["adapter_model.safetensors"]
        assert filecmp.cmpfiles(tmp_path / "None", tmp_path / patch, files, shallow=False)[0] == files
    model = adapted(head, "before", target_modules=targets(head, "attention"))
    inputs = batches(head)[0][0]
    loaded = peft.PeftModel.from_pretrained(fasttune.patch(build(head)), tmp_path / "before", is_trainable=True)
    assert torch.equal(loss_of(loaded, inputs), loss_of(model, inputs))
    with model.disable_adapter():
        assert torch.equal(loss_of(model, inputs), loss_of(fasttune.patch(build(head)), inputs))


@pytest.mark.parametrize("head", HEADS)
def test_unpatching_inside(head):
    model = adapted(head, "before", dropout=0.1, target_modules=targets(head, "attention"))
    inputs = batches(head)[0][0]
    fasttune.unpatch(model)
    stock = adapted(head, None, dropout=0.1, target_modules=targets(head, "attention"))
    torch.manual_seed(0)
    loss, grads = gradients(model, inputs)
    torch.manual_seed(0)
    expected, expected_grads = gradients(stock, inputs)
    assert torch.equal(loss, expected)
    assert all(torch.equal(grads[name], expected_grads[name]) for name in expected_grads)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_checkpointing_with_adapters(head, packing):
    """PEFT's way with frozen embeddings: their output is made to require a gradient by a hook."""
    runs = []
    for checkpointed in (False, True):
        model = adapted(head, None, dropout=0.1, target_modules=targets(head, "attention"))
        # A checkpointed last layer is not trimmed, which is rounded elsewhere.
        fasttune.patch(model, trim=False, packing=packing)
        model.enable_input_require_grads()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        torch.manual_seed(6)
        runs.append(train(model, batches(head)))
    if not packing:
        assert runs[0].losses == runs[1].losses
    # A reentrant checkpoint first runs without gradients, and so with padding, which may be rounded elsewhere.
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=1e-6, abs=0)
    for one, other in zip(runs[0].gradients, runs[1].gradients, strict=True):
        if packing:
            largest = max(grad.abs().max().item() for grad in one.values())
            assert max(max_error(one[name], other[name]) for name in one) <= 1e-6 * largest
        else:
            assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForSequenceClassification"])
def test_prompts(head, kind):
    """Virtual tokens as embeddings, and as keys and values of a cache."""
    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    data = [[batch_of(build(head), padding=padding, seed=9)] for padding in (None, "right")]
    if kind == "prefix" and head.startswith("Bert"):
        pytest.skip("BERT takes no cache as an encoder")

    def make(patch):
        return adapted(head, patch, config(task_type=TASKS[head], num_virtual_tokens=3))

    check(make, head, data)
