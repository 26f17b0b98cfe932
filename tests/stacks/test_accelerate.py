"""Hugging Face accelerate: prepared models, accumulation, mixed precision, saved states."""

import copy

import pytest
import torch
from models import build, loss_of
from runs import Run, assert_same_run, batches, exact_run, sgd

import fasttune
from fasttune.patching.promises.loss import LinearRows

accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps its choices for the life of a process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def accelerated(model, data, precision="no"):
    parts = len(data[0])
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=parts)
    prepared, optimizer = accelerator.prepare(model, sgd(model))
    run = Run()
    for step in data:
        total = 0.0
        for inputs in step:
            with accelerator.accumulate(prepared):
                loss = loss_of(prepared, inputs)
                accelerator.backward(loss)
                total += loss.item() / parts
                if accelerator.sync_gradients:
                    run.note(total, model.named_parameters())
                optimizer.step()
                optimizer.zero_grad()
    return run, accelerator, prepared


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_accelerate(head, parts, precision, monkeypatch):
    model, data = build(head), batches(head, parts)
    exact = exact_run(model, data)
    stock, _, _ = accelerated(copy.deepcopy(model), data, precision)
    computed = []
    compute = LinearRows.compute
    monkeypatch.setattr(LinearRows, "compute", lambda rows, ids: computed.append(rows) or compute(rows, ids))
    ours, accelerator, prepared = accelerated(fasttune.patch(model), data, precision)
    # Outputs are cast, logits still unread.
    assert not [rows for rows in computed if rows.features == model.config.vocab_size]
    assert_same_run(ours, stock, exact, torch.bfloat16 if precision == "bf16" else torch.float32)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert unwrapped is model
    fasttune.unpatch(unwrapped)
    assert fasttune.report(unwrapped).rows == ()


def test_saved_state_goes_on(tmp_path):
    head = "BertForMaskedLM"
    data = batches(head)
    model = fasttune.patch(build(head, dropout=0.1))
    _, accelerator, prepared = accelerated(model, data[:2])
    accelerator.save_state(tmp_path)
    losses = [loss_of(prepared, parts[0]).item() for parts in data[2:]]
    accelerator.load_state(tmp_path)  # weights, and the generator's state with them
    assert [loss_of(prepared, parts[0]).item() for parts in data[2:]] == losses
