"""Patched models under the Trainer, a plain loop and torch.compile."""

import copy

import pytest
import torch
from models import VOCABULARY, batch_of, build, gradients, loss_of

import fasttune

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def examples(head, count=24):
    g = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        length = 5 + i % 8
        ids = torch.randint(4, VOCABULARY, (length,), generator=g).tolist()
        ids += [1] * (12 - length)
        mask = [1] * length + [0] * (12 - length)
        if "Sequence" in head:
            labels = i % 3
        else:
            labels = [token if real else -100 for token, real in zip(ids, mask, strict=True)]
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def accuracy(prediction):
    logits, labels = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
    return {"accuracy": (logits.argmax(-1) == labels).double().mean().item(), "shape": float(logits.dim())}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="fp32"),
        pytest.param({"bf16": True}, id="bf16"),
        pytest.param({"gradient_accumulation_steps": 2, "gradient_checkpointing": True}, id="accumulated-checkpointed"),
        pytest.param({"label_smoothing_factor": 0.1}, id="smoothed"),
    ],
)
@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM", "BertForSequenceClassification"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_trainer(head, options, tmp_path):
    histories = []
    for patched in (False, True):
        model = build(head)
        if patched:
            fasttune.patch(model)
        arguments = transformers.TrainingArguments(
            tmp_path / str(patched),
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            max_steps=4,
            learning_rate=1e-3,
            logging_steps=1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            seed=3,
            disable_tqdm=True,
            **options,
        )
        trainer = transformers.Trainer(
            model, arguments, train_dataset=examples(head), eval_dataset=examples(head, 6), compute_metrics=accuracy
        )
        trainer.train()
        metrics = trainer.evaluate()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        histories.append(([*losses, metrics["eval_loss"]], metrics["eval_accuracy"], metrics["eval_shape"]))
    (stock, stock_accuracy, stock_shape), (ours, our_accuracy, our_shape) = histories
    assert len(stock) == 5
    assert our_shape == stock_shape
    bf16 = options.get("bf16", False)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(stock), rtol=2e-2 if bf16 else 2e-4, atol=0)
    assert abs(our_accuracy - stock_accuracy) < (0.2 if bf16 else 0.02)


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForSequenceClassification", "BertForMaskedLM"])
def test_plain_loop_follows_stock(head):
    losses = {}
    for patched in (False, True):
        model = build(head)
        if patched:
            fasttune.patch(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(6):
            loss = loss_of(model, batch_of(model, seed=step, padding=[None, "right", "left"][step % 3]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.setdefault(patched, []).append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[True]), torch.tensor(losses[False]), rtol=2e-4, atol=0)


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM", "BertForSequenceClassification"])
@pytest.mark.filterwarnings("ignore")
def test_compiled_model(head):
    stock, ours = build(head), fasttune.patch(build(head))
    inputs = batch_of(stock) | ({"use_cache": False} if head.startswith("GPT2") else {})
    loss, grads = gradients(stock, inputs)
    compiled = torch.compile(ours, backend="aot_eager")
    ours.zero_grad()
    our_loss = compiled(**inputs).loss
    our_loss.backward()
    torch.testing.assert_close(our_loss, loss)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


def test_patching_a_compiled_model_and_back():
    model = build("BertForSequenceClassification")
    inputs = batch_of(model)
    expected = loss_of(model, inputs)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    assert fasttune.patch(compiled) is compiled
    torch.testing.assert_close(compiled(**inputs).loss, expected)
    fasttune.unpatch(compiled)
    torch.testing.assert_close(compiled(**inputs).loss, expected)
    torch._dynamo.reset()


def test_two_threads_train_two_models():
    from concurrent.futures import ThreadPoolExecutor

    heads = ["GPT2LMHeadModel", "BertForMaskedLM", "GPT2LMHeadModel", "BertForSequenceClassification"]
    models = [fasttune.patch(build(head)) for head in heads]

    def losses(model):
        return [gradients(model, batch_of(model, padding="right", seed=step))[0].item() for step in range(4)]

    alone = [losses(model) for model in models]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(losses, models)) == alone
