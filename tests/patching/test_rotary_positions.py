"""Rotary layers turn each token by the position that the caller gives it, row by row."""

import pytest
import torch
from model_parity import note_errors, settle
from models import batch_of, build, copy_in, gradients

import fasttune


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("head", ["ModernBertForMaskedLM", "ModernBertDecoderForCausalLM", "EsmForMaskedLM"])
def test_positions_of_each_row(head, padding):
    """Rotary scores depend on differences alone, so the rows count in steps of their own."""
    model = build(head)
    inputs = batch_of(model, padding=padding)
    rows, length = inputs["input_ids"].shape
    positions = torch.arange(length) * torch.arange(1, rows + 1)[:, None]

    def draw(errors, seed):
        model = build(head, seed=seed)
        given = batch_of(model, padding=padding, seed=seed + 1) | {"position_ids": positions}
        runs = [gradients(which, given) for which in (copy_in(model, torch.float64), model, fasttune.patch(model))]
        exact, stock, ours = ({"loss": loss, **grads} for loss, grads in runs)
        assert not torch.equal(stock["loss"], gradients(model, given | {"position_ids": positions[:1]})[0])
        note_errors(errors, ours, (stock,), exact)

    settle(draw)
