"""MPNet's bias by distance: a table for its layers, stock's tensor for whoever reads it, and never a guess."""

import copy

import pytest
import torch
from models import batch_of, build, gradients
from transformers.models.mpnet import modeling_mpnet as stock

import fasttune
from fasttune.patching.promises.distances import DistanceBias


def encoders(**changes):
    model = build("MPNetModel", **changes)
    return model.encoder, fasttune.patch(copy.deepcopy(model)).encoder


def aside(model):
    return " ".join(row.note for row in fasttune.report(model).rows)


@pytest.mark.parametrize("length", [1, 2, 13, 128, 129, 514])
def test_the_tensor_is_stocks(length):
    theirs, ours = encoders()
    x, upstream = torch.randn(2, length, 64), torch.randn(2, 4, length, length)
    expected, promised = theirs.compute_position_bias(x), ours.compute_position_bias(x)
    assert isinstance(promised, DistanceBias)
    assert (promised.shape, promised.dtype) == (expected.shape, expected.dtype)
    actual = promised * 1.0
    assert type(actual) is torch.Tensor
    assert torch.equal(actual, expected)
    for encoder, bias in ((theirs, expected), (ours, actual)):
        bias.backward(upstream)
        encoder.found = encoder.relative_attention_bias.weight.grad
    # Stock adds every pair to its bucket, the table first the pairs of a distance.
    torch.testing.assert_close(ours.found, theirs.found, rtol=1e-4, atol=1e-5 * length)


@pytest.mark.parametrize("padding", [None, "right", "left", "scattered"])
def test_layers_are_packed_where_distances_are_kept(padding):
    model = fasttune.patch(build("MPNetForSequenceClassification"))
    gradients(model, batch_of(model, batch=4, padding=padding))
    rows = {row.modules: row for row in fasttune.report(model).rows}
    assert rows["(layers)"].calls == (0 if padding == "scattered" else 2)
    assert ("stand side by side" in rows["(layers)"].note) == (padding == "scattered")


def _same_as_stock(model, batch, change, *, packed=False):
    """change: what somebody does to a model before its step."""
    models = [model, fasttune.patch(copy.deepcopy(model))]
    results = []
    for either in models:
        change(either)
        loss, found = gradients(either, batch)
        results.append({"loss": loss, **found})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)
    rows = {row.modules: row for row in fasttune.report(models[1]).rows}
    assert bool(rows["(layers)"].calls) == packed


def test_who_writes_into_the_bias_gets_what_he_wrote():
    model = build("MPNetForMaskedLM")

    def change(either):
        def halve(module, args):
            with torch.no_grad():
                args[2].mul_(0.5)

        for layer in either.mpnet.encoder.layer:
            layer.attention.attn.register_forward_pre_hook(halve)

    _same_as_stock(model, batch_of(model, padding="right"), change)


def test_who_reads_it_changes_nothing():
    model, seen = build("MPNetForMaskedLM"), []

    def change(either):
        either.mpnet.encoder.layer[0].register_forward_pre_hook(lambda module, args: seen.append(args[2] + 1.0))

    # The layer that is looked at runs as it stands, the second one is promised.
    _same_as_stock(model, batch_of(model, padding="right"), change, packed=True)
    torch.testing.assert_close(*seen)


def test_another_bias_is_taken_as_it_is():
    model = build("MPNetForMaskedLM")

    def change(either):
        bias = torch.randn(1, 4, 13, 13, generator=torch.Generator().manual_seed(0))
        either.mpnet.encoder.compute_position_bias = lambda x: bias.expand(x.shape[0], -1, -1, -1)

    _same_as_stock(model, batch_of(model, padding="right"), change)


@pytest.mark.parametrize("name", ["compute_position_bias", "relative_position_bucket"])
def test_a_replaced_method_of_the_class_is_called(monkeypatch, name):
    model = build("MPNetForMaskedLM")
    if name == "compute_position_bias":
        shipped = stock.MPNetEncoder.compute_position_bias
        monkeypatch.setattr(stock.MPNetEncoder, name, lambda self, x: 2.0 * shipped(self, x))
    else:
        monkeypatch.setattr(stock.MPNetEncoder, name, staticmethod(lambda distance, num_buckets=32: distance.abs() % 7))
    _same_as_stock(model, batch_of(model, padding="right"), lambda either: None)


def test_no_bias_at_all():
    model = build("MPNetForMaskedLM")

    def change(either):
        either.mpnet.encoder.compute_position_bias = lambda x: None

    _same_as_stock(model, batch_of(model, padding="left"), change, packed=True)


def test_attention_weights_are_handed_out():
    model = build("MPNetModel").eval()
    batch = batch_of(model, padding="right")
    expected = model(**batch, output_attentions=True)
    actual = fasttune.patch(copy.deepcopy(model))(**batch, output_attentions=True)
    for ours, theirs in zip(actual.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_row_without_a_real_token_runs_as_stock():
    """Each of its queries sees every key then, at a distance that counts."""
    model = build("MPNetForMaskedLM")
    batch = batch_of(model, padding="right")
    batch["attention_mask"][1] = 0
    _same_as_stock(model, batch, lambda either: None)
