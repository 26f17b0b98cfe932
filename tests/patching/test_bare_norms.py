"""LayerNorms without a bias, or without weights at all, in the place of a model's own: fused all the same."""

import pytest
import torch
from model_parity import note_errors, settle
from models import batch_of, build, copy_in, gradients
from torch import nn

import fasttune

OPTIONS = {"no bias": {"bias": False}, "no weights": {"elementwise_affine": False}}


def with_bare_norms(head, seed, options):
    """The model with its norms replaced, and their weights kept where there are some."""
    model = build(head, seed=seed)
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, nn.LayerNorm):
                bare = nn.LayerNorm(norm.normalized_shape, norm.eps, **options)
                if bare.weight is not None:
                    bare.weight.data.copy_(norm.weight)
                setattr(module, name, bare)
    return model


# Packing and trim compute layers as functions of rows; without them the modules themselves run.
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "modules"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("head", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_loss_and_gradients(head, options, rows):
    def draw(errors, seed):
        model = with_bare_norms(head, seed, OPTIONS[options])
        inputs = batch_of(model, seed=seed + 1, batch=4, padding="right")
        runs = [gradients(which, inputs) for which in (copy_in(model, torch.float64), model)]
        fasttune.patch(model, packing=rows, trim=rows)
        exact, stock, ours = ({"loss": loss, **grads} for loss, grads in (*runs, gradients(model, inputs)))
        assert ours.keys() == stock.keys()
        note_errors(errors, ours, (stock,), exact)
        # A sum of embeddings whose norm has neither weight nor bias is the one thing that is left to stock.
        every = fasttune.report(model).rows
        assert sum(row.calls for row in every if row.modules == "(layers)") == 2 * rows
        report = [row for row in every if not row.modules.startswith("(")]
        left = {row.modules for row in report if not row.runs}
        norms = [row for row in report if "layer_norm" in row.runs or "LayerNorm" in row.runs]
        assert norms
        assert all(row.calls > 0 or "around it" in row.note for row in norms)
        assert left == ({"bert.embeddings"} if head.startswith("Bert") and options == "no weights" else set())

    settle(draw)


def test_a_norm_over_two_dimensions_is_left_alone_and_named():
    model = build("GPT2LMHeadModel")
    model.transformer.ln_f = nn.LayerNorm((13, 64))
    rows = {row.modules: row for row in fasttune.report(fasttune.patch(model)).rows}
    assert rows["transformer.ln_f"].note == "it normalises more than one dimension"
