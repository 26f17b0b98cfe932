"""fasttune.verify: it passes what agrees, sees seeded bugs, and leaves the model as it was.

Batches without padding, or heads whose outputs do not depend on it, where a test wants agreement: what verify says of
padding is for tests/patching to act on.
"""

import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fasttune
from fasttune import patching, verification

sys.path.insert(0, str(Path(__file__).parent / "patching"))
transformers = pytest.importorskip("transformers")
from models import batch_of, build  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet", "one_thread")


def classifier(**changes):
    model = build("BertForSequenceClassification", dropout=0.1, **changes)
    return model, batch_of(model, padding="right")


@pytest.fixture
def seeded(monkeypatch):
    """Makes `bug(copy)` happen to every copy that verify patches."""

    def seed(bug):
        patch = patching.patch

        def patch_with_bug(model, **options):
            bug(patch(model, **options))
            return model

        monkeypatch.setattr(patching, "patch", patch_with_bug)

    return seed


def failing(found):
    return [(row.kind, row.name) for row in found.rows if not row.ok]


# --------------------------------------------------------------------------------------------------------- what agrees


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("head", "padding"),
    [
        ("BertForSequenceClassification", "right"),
        ("BertModel", "left"),
        ("GPT2LMHeadModel", None),
        ("RobertaForQuestionAnswering", "right"),
        ("ElectraForMaskedLM", None),
    ],
)
def test_a_patched_model_agrees(head, padding, dtype):
    model = build(head, dropout=0.1).to(dtype)
    found = fasttune.verify(model, batch_of(model, padding=padding), repeats=2)
    assert found, str(found)
    assert found.ok
    assert found.reference == "float64"
    assert {row.kind for row in found.rows} == {"loss", "output", "gradient"}
    assert found.speedup > 0
    assert found.stock_seconds > 0
    assert found.patched_seconds > 0
    patched = fasttune.report(fasttune.patch(model))
    ours, theirs = ({(row.modules, row.runs) for row in rows} for rows in (patched.rows, found.report.rows))
    assert ours == {row for row in theirs if row[0] != "(reads)"}  # the comparison reads what it compares
    assert [row.share for row in found.rows] == sorted((row.share for row in found.rows), reverse=True)


def test_every_gradient_and_every_output_has_a_row():
    model = build("BertForSequenceClassification", num_hidden_layers=1)
    batch = batch_of(model)
    model.bert.embeddings.requires_grad_(False)
    found = fasttune.verify(model, {**batch, "output_hidden_states": True}, repeats=0)
    rows = {(row.kind, row.name) for row in found.rows}
    outputs = ["logits", "hidden_states.0", "hidden_states.1"]
    assert rows == {
        ("loss", "loss"),
        *(("output", name) for name in outputs),
        *(("output", f"in evaluation: {name}") for name in ["loss", *outputs]),
        *(("gradient", name) for name, parameter in model.named_parameters() if parameter.requires_grad),
    }
    assert found, str(found)
    assert found.speedup is None


def test_autocast_is_the_callers():
    model, batch = classifier()
    with torch.autocast("cpu", torch.bfloat16):
        found = fasttune.verify(model, batch, repeats=0)
    assert found, str(found)
    (logits,) = [row for row in found.rows if row.name == "logits"]
    assert logits.stock_error > 1e-4  # ran in bfloat16, and was compared with float64


def test_the_table():
    model, batch = classifier()
    found = fasttune.verify(model, batch, repeats=1)
    said = str(found)
    assert "fasttune.verify on BertForSequenceClassification: the numbers agree" in said
    assert f"and {len(found.rows) - said.count('e-') // 3} more within their bounds" in said
    assert "the same step in float64 (bound: twice stock's error + 1 ulp)" in " ".join(said.split())
    assert " ms patched: " in said
    assert max(map(len, said.splitlines())) <= 100


# --------------------------------------------------------------------------------------------------------- seeded bugs


def scale_a_gradient(model):
    model.get_parameter("encoder.layer.0.output.dense.weight").register_hook(lambda grad: grad * 1.001)


def lose_a_gradient(model):
    model.get_parameter("encoder.layer.1.output.dense.bias").requires_grad_(False)


def change_padding(model):
    def hook(module, arguments, outputs):
        hidden = outputs.last_hidden_state.detach().clone()
        hidden[1, -1] += 1e-3  # padding
        outputs.last_hidden_state = hidden + (outputs.last_hidden_state - outputs.last_hidden_state.detach())

    model.register_forward_hook(hook)


def widen_an_output(model):
    def hook(module, arguments, outputs):
        outputs.pooler_output = outputs.pooler_output.double()

    model.register_forward_hook(hook)


def drop_an_output(model):
    model.register_forward_hook(lambda m, a, outputs: type(outputs)(last_hidden_state=outputs.last_hidden_state))


def a_nan(model):
    def hook(module, arguments, outputs):
        poison = torch.zeros_like(outputs.pooler_output)
        poison[0, 0] = float("nan")
        outputs.pooler_output = outputs.pooler_output + poison

    model.register_forward_hook(hook)


@pytest.mark.parametrize(
    ("bug", "row", "note"),
    [
        (scale_a_gradient, ("gradient", "encoder.layer.0.output.dense.weight"), ""),
        (lose_a_gradient, ("gradient", "encoder.layer.1.output.dense.bias"), "stock has one, patched has none"),
        (change_padding, ("output", "last_hidden_state"), ""),
        (widen_an_output, ("output", "pooler_output"), "patched is (3, 64) float64, stock (3, 64) float32"),
        (drop_an_output, ("output", "pooler_output"), "stock has one, patched has none"),
        (a_nan, ("output", "pooler_output"), "patched is not finite where stock is"),
    ],
)
def test_a_seeded_bug_is_seen(bug, row, note, seeded):
    model = build("BertModel")
    seeded(bug)
    # A loss that reads neither padding nor the pooler, so that each bug shows in its own row.
    found = fasttune.verify(
        model, batch_of(model, padding="right"), lambda outputs, batch: outputs.last_hidden_state[:, 0].square().mean()
    )
    assert not found
    assert row in failing(found)
    assert {kind for kind, _ in failing(found)} == {row[0]}
    (failed,) = [each for each in found.rows if (each.kind, each.name) == row]
    assert failed.note == note
    said = str(found)
    assert f"{len(failing(found))} of {len(found.rows)} values beyond their bound" in said
    assert said.count("BEYOND") == len(failing(found))
    assert max(map(len, said.splitlines())) <= 100


def test_a_loss_off_by_a_ten_thousandth_is_seen(seeded):
    model, batch = classifier()

    def off(module, arguments, outputs):
        outputs.loss = outputs.loss + 1e-4

    seeded(lambda patched: patched.register_forward_hook(off))
    found = fasttune.verify(model, batch, repeats=0)
    assert set(failing(found)) == {("loss", "loss"), ("output", "in evaluation: loss")}


# -------------------------------------------------------------------------------------------------- leaving no trace


def state_of(model):
    """Everything a user could see of a model, and of the random generators, before and after."""
    torch.rand(1)
    state = {"python": random.getstate(), "torch": torch.random.get_rng_state().tolist()}
    for name, module in model.named_modules():
        attributes = {
            key: value if isinstance(value, (bool, int, float, str)) else id(value)
            for key, value in vars(module).items()
        }
        hooks = {key: dict(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        state[name] = type(module), attributes, hooks, {key: id(value) for key, value in module._modules.items()}
        if hasattr(module, "config"):
            state[f"{name} config"] = id(module.config), module.config.to_dict()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
        state[f"{name} tensor"] = id(tensor), tensor.tolist(), tensor.requires_grad, tensor._version, grad
        state[f"{name} hooks"] = list(getattr(tensor, "_post_accumulate_grad_hooks", None) or ())
    return state


def unchanged(model, run):
    """Asserts that run() changes nothing of the model nor of the random generators."""
    torch.manual_seed(5)
    random.seed(5)
    before = state_of(model)
    random_state = torch.random.get_rng_state()
    run()
    assert torch.equal(torch.random.get_rng_state(), random_state)
    torch.manual_seed(5)
    assert state_of(model) == before
    assert torch.is_grad_enabled()


def lived_in(patched, copyable=True):
    """A model with modes, gradients, frozen parts and hooks of its own."""
    model, batch = classifier()
    model.bert.encoder.layer[0].eval()
    model.bert.embeddings.requires_grad_(False)
    model.register_forward_hook(lambda module, arguments, outputs: None)
    model.classifier.weight.register_post_accumulate_grad_hook(lambda parameter: pytest.fail("the caller's weight"))
    model.bert.pooler.dense.weight.grad = torch.ones_like(model.bert.pooler.dense.weight)
    model.register_buffer("odd", torch.ones(2))
    if not copyable:
        model.held = (torch.ones(2, requires_grad=True) * 2,)  # no leaf: deepcopy raises
    if patched:
        fasttune.patch(model, packing=False, norms=False)
    return model, batch


CASES = pytest.mark.parametrize(
    ("patched", "copyable"), [(False, True), (True, True), (False, False)], ids=["stock", "patched", "not copyable"]
)


@CASES
@pytest.mark.filterwarnings("ignore:.*hooks")
def test_the_model_is_as_it_was(patched, copyable):
    model, batch = lived_in(patched, copyable)
    kept = {name: value.clone() for name, value in batch.items()}
    found = []
    unchanged(model, lambda: found.append(fasttune.verify(model, batch, repeats=1, dropout=8)))
    assert found[0], str(found[0])
    assert all(torch.equal(batch[name], kept[name]) for name in kept)
    assert any("cannot be copied" in note for note in found[0].notes) == (not copyable)


@CASES
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 3, 4])  # in float64, in stock, in the patched copy, in a timed step
def test_the_model_is_as_it_was_after_an_exception(patched, copyable, error, call):
    model, batch = lived_in(patched, copyable)
    calls = []

    def loss(outputs, batch):
        calls.append(outputs)
        if len(calls) >= call:
            raise error("enough")
        return outputs.loss

    def run():
        with pytest.raises(error, match="enough"):
            fasttune.verify(model, batch, loss)

    unchanged(model, run)


def test_a_model_in_evaluation_mode_is_verified_in_training_mode():
    model, batch = classifier()
    modes = []
    model.register_forward_hook(lambda module, arguments, outputs: modes.append(module.training))
    model.eval()
    assert fasttune.verify(model, batch, repeats=0)
    assert True in modes
    assert not model.training


def test_a_patched_model_is_verified_as_it_is_patched():
    model, batch = classifier()
    fasttune.patch(model, norms=False, trim=False)
    rows = {row.modules: row.runs for row in fasttune.report(model).rows}
    found = fasttune.verify(model, batch, repeats=0)
    assert {row.modules: row.runs for row in found.report.rows} == rows
    other = fasttune.verify(model, batch, repeats=0, norms=True)
    assert {row.modules: row.runs for row in other.report.rows} != rows
    assert {row.modules: row.runs for row in fasttune.report(model).rows} == rows


def test_a_patched_model_that_cannot_be_copied_is_not_touched():
    model, batch = lived_in(patched=True, copyable=False)

    def run():
        with pytest.raises(ValueError, match="cannot be copied .*Call fasttune.unpatch"):
            fasttune.verify(model, batch)

    unchanged(model, run)


# ------------------------------------------------------------------------------------------------ models and batches


class Training(nn.Module):
    """As a LightningModule has it: the model is an attribute, and forward takes the batch."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.trainer = None

    def forward(self, batch):
        return self.model(**batch).loss


class Embedder(nn.Module):
    """As SentenceTransformer has it: features are one dict, which forward adds to."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, features):
        features["token_embeddings"] = self.model(**features).last_hidden_state
        features["sentence_embedding"] = features["token_embeddings"].mean(1)
        return features


def test_models_around_a_model():
    model, batch = classifier()
    found = fasttune.verify(Training(model), (batch,), repeats=0)
    assert found, str(found)
    assert ("output", "outputs") in {(row.kind, row.name) for row in found.rows}
    model = build("BertModel", dropout=0.1)
    batch = batch_of(model)
    found = fasttune.verify(Embedder(model), (batch,), repeats=0)
    assert found, str(found)
    assert "token_embeddings" not in batch
    assert "sentence_embedding" in {row.name for row in found.rows}


def test_peft():
    peft = pytest.importorskip("peft")
    model, batch = classifier()
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], lora_dropout=0.2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    found = fasttune.verify(model, batch, repeats=0)
    assert found, str(found)
    assert not found.notes  # its dropout was off
    gradients = {row.name for row in found.rows if row.kind == "gradient"}
    assert gradients == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_forms_of_a_batch():
    model = build("BertModel")
    batch = batch_of(model)
    same = [
        fasttune.verify(model, form, repeats=0).rows
        for form in (batch["input_ids"], (batch["input_ids"],), {"input_ids": batch["input_ids"]})
    ]
    assert same[0] == same[1] == same[2]
    encoding = transformers.BatchEncoding(dict(batch))
    assert fasttune.verify(model, encoding, repeats=0).rows == fasttune.verify(model, batch, repeats=0).rows


def test_gradients_of_inputs_are_compared():
    model = build("BertModel")
    embeds = torch.randn(2, 9, 64, requires_grad=True)
    found = fasttune.verify(model, {"inputs_embeds": embeds}, repeats=0)
    assert found, str(found)
    assert ("gradient", "batch: inputs_embeds") in {(row.kind, row.name) for row in found.rows}
    assert embeds.grad is None


def test_a_loss_of_ones_own():
    model = build("BertModel")
    batch = batch_of(model, padding="right")
    head = nn.Linear(64, 2, dtype=torch.float64)
    head.weight.grad = torch.ones_like(head.weight)

    def loss(outputs, batch):
        real = batch["attention_mask"].unsqueeze(-1)
        return (head(outputs.last_hidden_state.double()) * real).square().mean()

    found = fasttune.verify(model, batch, loss, repeats=1)
    assert found, str(found)
    assert torch.equal(head.weight.grad, torch.ones_like(head.weight))
    assert head.bias.grad is None


def test_a_loss_that_holds_the_model_is_refused():
    model = build("BertModel")

    def loss(outputs, batch):
        return (outputs.last_hidden_state.double() * model.embeddings.LayerNorm.weight.double()).sum()

    with pytest.raises(ValueError, match="leads back to the parameters of the model itself"):
        fasttune.verify(model, batch_of(model), loss)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_label_at_all():
    """The mean over nothing is NaN, in stock as well."""
    model = build("BertForMaskedLM")
    batch = batch_of(model)
    batch["labels"].fill_(-100)
    found = fasttune.verify(model, batch, repeats=0)
    (loss,) = [row for row in found.rows if row.kind == "loss"]
    assert loss.ok


# ---------------------------------------------------------------------------------------- without float64, with dropout


class Single(nn.Module):
    """Knows float32 alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, **batch):
        hidden = self.model(**batch).last_hidden_state
        return nn.functional.linear(hidden, torch.diag(self.scale.float()))


@pytest.mark.parametrize("why", ["a module", "memory"])
def test_without_float64_stock_is_the_measure(why, seeded, monkeypatch):
    model = build("BertModel")
    batch = batch_of(model)
    if why == "a module":
        model = Single(model)
    else:
        monkeypatch.setattr(verification, "available_bytes", lambda device: 1000)
    found = fasttune.verify(model, batch, repeats=0)
    assert found, str(found)
    assert found.reference == "stock"
    assert "There is no float64 step" in str(found)
    assert "3 × what stock moves by" in " ".join(str(found).split())
    seeded(lambda patched: scale_a_gradient(getattr(patched, "model", patched)))
    found = fasttune.verify(model, batch, repeats=0)
    assert {kind for kind, _ in failing(found)} == {"gradient"}
    assert any("encoder.layer.0.output.dense.weight" in name for _, name in failing(found))


def test_without_float64_the_bound_is_of_the_size_of_stocks_error(monkeypatch):
    """The measure is not so loose that it would pass anything, nor so tight that stock would fail."""
    model, batch = classifier()
    exact = {row.name: row for row in fasttune.verify(model, batch, repeats=0).rows}
    monkeypatch.setattr(verification, "available_bytes", lambda device: 1000)
    rows = fasttune.verify(model, batch, repeats=0).rows
    ratios = sorted(row.bound / exact[row.name].bound for row in rows)
    assert 0.3 < ratios[len(ratios) // 2] < 5


def test_dropout_agrees_on_average(seeded):
    model, batch = classifier()
    found = fasttune.verify(model, batch, dropout=True, repeats=0)
    assert found, str(found)
    assert len([row for row in found.rows if row.kind == "dropout"]) == 4
    assert all(name in str(found) for name in ("mean loss of 32 steps", "mean gradient norm of 32 steps"))

    def without(patched):
        for module in patched.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    seeded(without)
    found = fasttune.verify(model, batch, dropout=True, repeats=0)
    assert {kind for kind, _ in failing(found)} == {"dropout"}


def test_a_model_without_dropout_says_so():
    model = build("BertForSequenceClassification")
    found = fasttune.verify(model, batch_of(model), dropout=8, repeats=0)
    assert found, str(found)
    assert any("the model has no dropout" in note for note in found.notes)


class Noisy(Training):
    def forward(self, batch):
        loss = super().forward(batch)
        return loss * (1 + 0.1 * torch.rand(()).to(loss.dtype))


def test_other_random_numbers_are_mentioned():
    model, batch = classifier()
    found = fasttune.verify(Noisy(model), (batch,), repeats=0)
    assert any("draws random numbers even with dropout off" in note for note in found.notes)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "bert"}, "model is a str; expected a torch.nn.Module"),
        ({"batch": [1]}, "batch is a list; expected a mapping.*next\\(iter\\(loader\\)\\)"),
        ({"loss": 3}, "loss is a int; expected None or a function loss\\(outputs, batch\\)"),
        (
            {"loss": lambda outputs, batch: outputs.logits},
            "returned shape \\(3, 3\\); expected a tensor of one element",
        ),
        ({"loss": lambda outputs, batch: 1.0}, "returned a float; expected a tensor of one element"),
        ({"loss": lambda outputs, batch: outputs.loss.detach()}, "the loss has no gradient; expected one that depends"),
        ({"dropout": 1}, "dropout is 1; expected False, True or at least 8 steps"),
        ({"repeats": -1}, "repeats is -1; expected how many pairs"),
        ({"packing": "yes"}, "packing is 'yes'; expected"),
        ({"model": nn.Linear(2, 2)}, "does not know Linear"),
    ],
)
def test_errors_are_sentences(arguments, message):
    model, batch = classifier()
    arguments = {"model": model, "batch": batch, **arguments}
    with pytest.raises((TypeError, ValueError), match=message):
        fasttune.verify(**arguments)


def test_what_only_the_patched_copy_raises_is_marked(seeded):
    model, batch = classifier()

    def hook(module, arguments, outputs):
        raise RuntimeError("a bug")

    seeded(lambda patched: patched.register_forward_hook(hook))
    with pytest.raises(RuntimeError, match="a bug") as raised:
        fasttune.verify(model, batch)
    assert "the patched copy raised this" in raised.value.__notes__[0]
