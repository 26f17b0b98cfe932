"""The report tells what happened: in how many calls, in how many not, why, and who read every row."""

import copy

import pytest
import torch
from models import batch_of, build, loss_of

import fasttune
from fasttune import ops


def rows_of(model):
    return {row.modules: row for row in fasttune.report(model).rows}


def patched(head):
    return fasttune.patch(build(head).train())


def test_nothing_is_claimed_that_did_not_happen():
    model = patched("BertForSequenceClassification")
    assert {row.note for row in rows_of(model).values()} == {"has not run yet"}
    assert {row.calls for row in rows_of(model).values()} == {0}


def test_parts_say_that_the_module_around_them_did_their_work():
    model = patched("BertForSequenceClassification")
    loss_of(model, batch_of(model, padding="right"))
    rows = rows_of(model)
    layers = len(model.bert.encoder.layer)
    assert rows["(packing)"].calls == rows["(layers)"].calls == layers
    assert rows["(trim)"].calls == 1
    inside = [row for name, row in rows.items() if "encoder.layer" in name]
    assert inside
    assert all(row.calls == 0 and "around it" in row.note for row in inside)
    model.bert.encoder.layer[0].output.register_forward_hook(lambda *_: None)  # that layer runs as it stands
    loss_of(model, batch_of(model, padding="right"))
    rows = rows_of(model)
    assert rows["(layers)"].calls == 2 * layers - 1
    assert "hook" in rows["(packing)"].note
    assert all(row.calls > 0 for name, row in rows.items() if "encoder.layer" in name)


@pytest.mark.parametrize("padding", [None, "right"])
def test_who_reads_every_row_is_named(padding):
    model = patched("BertModel")
    inputs = batch_of(model, padding=padding)
    hidden = model(**inputs).last_hidden_state
    assert "(reads)" not in rows_of(model)  # the pooler's rows are a read that is understood
    hidden.cumsum(1)
    hidden.std()
    reads = rows_of(model)["(reads)"]
    assert reads.calls == 1
    assert reads.note == "1 by cumsum"
    torch.stack([model(**inputs).last_hidden_state.softmax(-1)])
    assert rows_of(model)["(reads)"].calls == 2
    assert copy.deepcopy(model)._fasttune.settings.reads.total() == 2


def test_reads_that_are_understood_are_not_counted():
    model = patched("BertModel")
    inputs = batch_of(model, padding="right")
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].to(hidden.dtype)
    ((hidden * mask).sum(1) / mask.sum(1)).sum().backward()
    model(**inputs).last_hidden_state[:, 0].sum().backward()
    assert "(reads)" not in rows_of(model)


def test_shapes_dtypes_and_devices_are_no_reads():
    model = patched("BertModel")
    inputs = batch_of(model, padding="right")
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"]
    wide = mask[..., None].expand_as(hidden).type_as(hidden)
    assert wide.shape == hidden.shape
    assert wide.dtype == hidden.dtype
    assert torch.ones_like(hidden, dtype=torch.float64).dtype == torch.float64
    for made in (torch.zeros_like(hidden), torch.rand_like(hidden)):
        assert type(made) is torch.Tensor
        assert made.dtype == hidden.dtype
        assert made.shape == hidden.shape
        assert made.is_contiguous()
    assert hidden.new_zeros(3).dtype == hidden.dtype
    assert torch.full_like(hidden, 2.0)[0, 0, 0] == 2
    hidden.masked_fill(wide == 0, float("-inf")).max(1).values.sum().backward()
    assert "(reads)" not in rows_of(model)


def test_evaluation_without_padding_reads_rows_that_are_there():
    model = patched("BertForSequenceClassification").eval()
    with torch.no_grad():
        model(**batch_of(model), output_hidden_states=True).hidden_states[1].std()
    assert "(reads)" not in rows_of(model)


def test_the_table_fits_100_columns():
    model = patched("RobertaForMaskedLM")
    loss_of(model, batch_of(model, padding="right"))
    assert max(len(line) for line in str(fasttune.report(model)).splitlines()) <= 100


@pytest.mark.parametrize(
    ("head", "changes", "mlp"),
    [
        ("BertForMaskedLM", {"hidden_act": "relu"}, "bert.encoder.layer.{0-1}.intermediate"),
        ("BertForMaskedLM", {"hidden_act": "silu"}, "bert.encoder.layer.{0-1}.intermediate"),
        ("BertForMaskedLM", {"hidden_act": "tanh"}, "bert.encoder.layer.{0-1}.intermediate"),
        ("GPT2LMHeadModel", {"activation_function": "quick_gelu"}, "transformer.h.{0-1}.mlp"),
    ],
)
def test_activations_that_are_fused_and_those_that_are_not(head, changes, mlp, monkeypatch):
    """By the module itself and as a function of rows; a head's transform takes GELU alone."""
    kinds = []
    original = ops.bias_activation
    monkeypatch.setattr(
        ops,
        "bias_activation",
        lambda *a, activation, **o: kinds.append(activation) or original(*a, activation=activation, **o),
    )
    (name,) = changes.values()
    for rows in (True, False):
        kinds.clear()
        model = fasttune.patch(build(head, **changes).train(), packing=rows, trim=rows)
        loss_of(model, batch_of(model, padding="right"))
        row = rows_of(model)[mlp]
        if name == "tanh":
            assert (row.runs, row.calls) == ("", 0)
            assert "Tanh(), which has no fused pass" in row.note
            assert not kinds
        else:
            assert "bias + activation" in row.runs
            assert "around it" in row.note if rows else row.calls == 2
            assert kinds == [name] * 2
    if head.startswith("Bert"):
        assert "not GELU" in rows_of(model)["cls.predictions.transform"].note or name == "tanh"
