"""transformers.Trainer: precision, accumulation, checkpointing, label smoothing, resuming, evaluation."""

import functools

import pytest
import torch
from models import PAD, VOCABULARY, build
from runs import LEARNING_RATE, STEPS, Run, assert_same_run
from transformers import Trainer, TrainerCallback, TrainingArguments

import fasttune

pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
HEADS = ["GPT2LMHeadModel", "BertForMaskedLM", "BertForSequenceClassification"]


def examples(head, count=24, longest=12):
    """Sequences of different lengths, padded on the right; classes, or tokens as labels on two thirds of the rows."""
    g = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        length = 3 + (5 * i) % (longest - 2)
        ids = torch.randint(4, VOCABULARY, (length,), generator=g).tolist()
        if "Sequence" in head:
            labels = i % 3
        else:
            labels = [token if place % 3 else -100 for place, token in enumerate(ids)] + [-100] * (longest - length)
        padding = longest - length
        mask = [1] * length + [0] * padding
        rows.append({"input_ids": ids + [PAD] * padding, "attention_mask": mask, "labels": labels})
    return rows


class Noting(Trainer):
    """Notes each step's loss and gradients."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.run, self.sum = Run(), 0.0
        trainer = self

        class Note(TrainerCallback):
            def on_pre_optimizer_step(self, arguments, state, control, model=None, **_):
                trainer.run.note(trainer.sum, model.named_parameters())
                trainer.sum = 0.0

        self.add_callback(Note())

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.sum += loss.item()
        return loss


def metrics_of(prediction):
    logits, labels = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
    counted = labels != -100
    return {"right": (logits.argmax(-1) == labels)[counted].double().mean().item(), "count": counted.sum().item()}


def trainer_of(model, folder, steps=STEPS, **options):
    head = type(model).__name__
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=steps,
        optim="sgd",
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        seed=3,
        disable_tqdm=True,
        **{"save_strategy": "no", "logging_steps": 1, "learning_rate": LEARNING_RATE} | options,
    )
    return Noting(
        model, arguments, train_dataset=examples(head), eval_dataset=examples(head, 7), compute_metrics=metrics_of
    )


OPTIONS = {
    "float32": {},
    "bfloat16": {"bf16": True},
    "accumulated": {"gradient_accumulation_steps": 2},
    "accumulated bfloat16": {"gradient_accumulation_steps": 2, "bf16": True},
    "accumulated, checkpointed": {
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "checkpointed, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "smoothed labels": {"label_smoothing_factor": 0.1},
}


def trained(model, folder, options):
    """(its run, its evaluation, its predictions where there is a label)."""
    head = type(model).__name__
    trainer = trainer_of(model, folder, **options)
    trainer.train()
    evaluation, prediction = trainer.evaluate(), trainer.predict(examples(head, 7))
    return trainer.run, evaluation, torch.tensor(prediction.predictions)[torch.tensor(prediction.label_ids) != -100]


CHANGING = ("gradient_accumulation_steps", "label_smoothing_factor")


@functools.cache
def exactly(head, folder, **options):
    """The same in float64. options: those of CHANGING; precision and checkpointing change no exact number."""
    return trained(build(head).double(), folder, options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("head", HEADS)
def test_trainer(head, options, tmp_path, tmp_path_factory):
    """Every step's loss and gradients, then the metrics and the predictions of the trained models."""
    options = OPTIONS[options]
    dtype = torch.bfloat16 if options.get("bf16") else torch.float32
    changing = {
        name: options[name] for name in ("gradient_accumulation_steps", "label_smoothing_factor") if name in options
    }
    sides = {
        "exact": exactly(head, tmp_path_factory.getbasetemp(), **changing),
        "stock": trained(build(head), tmp_path / "stock", options),
        "ours": trained(fasttune.patch(build(head)), tmp_path / "ours", options),
    }
    runs, evaluations, predictions = ({side: found[part] for side, found in sides.items()} for part in range(3))
    assert_same_run(runs["ours"], runs["stock"], runs["exact"], dtype)
    assert evaluations["ours"].keys() == evaluations["stock"].keys()
    assert evaluations["ours"]["eval_count"] == evaluations["stock"]["eval_count"]
    if dtype == torch.float32:
        assert evaluations["ours"]["eval_right"] == evaluations["exact"]["eval_right"]
    evaluated = {side: Run([evaluations[side]["eval_loss"]], [{"logits": predictions[side]}]) for side in runs}
    assert_same_run(evaluated["ours"], evaluated["stock"], evaluated["exact"], dtype)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_checkpointing_regenerates_the_masks(head, reentrant, tmp_path):
    runs = []
    for options in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        # A checkpointed last layer is not trimmed, and rows in another number are rounded elsewhere.
        model = fasttune.patch(build(head, dropout=0.1), trim=False)
        model.enable_input_require_grads()  # on both sides: a hook for which the embeddings step aside
        trainer = trainer_of(model, tmp_path, **options)
        trainer.train()
        runs.append(trainer.run)
    # The first pass of a reentrant checkpoint takes no promise: the same masks and numbers, in products of other sizes,
    # whose rounding the steps of the optimizer then carry on.
    floor = 1e-5 if reentrant else 0.0
    for plain, again in zip(runs[0].losses, runs[1].losses, strict=True):
        assert abs(plain - again) <= floor * abs(plain)
    for plain, again in zip(runs[0].gradients, runs[1].gradients, strict=True):
        largest = max(grad.abs().max().item() for grad in plain.values())
        assert all((plain[name] - again[name]).abs().max() <= 100 * floor * largest for name in plain)


@pytest.mark.parametrize("head", HEADS)
def test_resuming_from_a_checkpoint(head, tmp_path):
    """The rest of a run is bit for bit what it would have been, dropout 0.1 and accumulation included."""
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole = trainer_of(fasttune.patch(build(head, dropout=0.1)), tmp_path, **options)
    whole.train()
    assert fasttune.report(type(whole.model).from_pretrained(tmp_path / "checkpoint-2")).rows == ()
    rest = trainer_of(fasttune.patch(build(head, dropout=0.1, seed=9)), tmp_path, **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rest.run.losses == whole.run.losses[2:]
    for again, before in zip(rest.run.gradients, whole.run.gradients[2:], strict=True):
        assert all(torch.equal(again[name], before[name]) for name in before)


def test_a_patched_runs_checkpoint_resumes_on_the_stock_model(tmp_path):
    head, options = "BertForMaskedLM", {"save_strategy": "steps", "save_steps": 2}
    runs = {}
    for side, patched in (("ours", True), ("stock", False)):
        trainer_of(fasttune.patch(build(head)) if patched else build(head), tmp_path / side, 2, **options).train()
        trainer = trainer_of(build(head, seed=9), tmp_path / side, **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / side / "checkpoint-2"))
        runs[side] = trainer.run
    exact = trainer_of(build(head).double(), tmp_path / "exact")
    exact.train()
    exact.run = Run(exact.run.losses[2:], exact.run.gradients[2:])
    assert_same_run(runs["ours"], runs["stock"], exact.run)


def test_items_in_batch_reach_the_loss(tmp_path):
    """Trainer divides a causal loss by the labels of the whole accumulated batch: the patched model is told as well."""
    seen = []
    model = fasttune.patch(build("GPT2LMHeadModel"))
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((int(kwargs["num_items_in_batch"]), kwargs["labels"])),
        with_kwargs=True,
    )
    trainer_of(model, tmp_path, 2, gradient_accumulation_steps=2).train()
    assert len(seen) == 4
    for first, second in (seen[:2], seen[2:]):
        counts = [int((labels != -100).sum()) for _, labels in (first, second)]
        assert first[0] == second[0] == sum(counts)
        assert counts[0] != sum(counts)
