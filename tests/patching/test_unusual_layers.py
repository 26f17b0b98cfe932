"""Layers that are not quite what their class ships, or are called otherwise: stock's numbers, or stock's error."""

import copy

import pytest
import torch
from models import batch_of, build, gradients
from torch import nn

import fasttune


class Doubled(nn.Module):
    """Somebody's MLP, with none of the parts that a layer's MLP has."""

    def forward(self, x, *args):
        return 2.0 * x


def middle_of(model):
    """(the module that holds it, its name) of a layer's MLP."""
    base = model.base_model
    layer = (
        base.layers
        if hasattr(base, "layers")
        else (base.transformer if hasattr(base, "transformer") else base.encoder).layer
    )[1]
    return layer, next(name for name in ("mlp", "ffn", "intermediate") if hasattr(layer, name))


@pytest.mark.parametrize("head", ["ModernBertForMaskedLM", "DistilBertForMaskedLM"])
def test_an_mlp_without_the_known_parts_runs_as_it_is(head):
    model = build(head)
    setattr(*middle_of(model), Doubled())
    inputs = batch_of(model, padding="right")
    stock, expected = gradients(copy.deepcopy(model), inputs)
    loss, found = gradients(fasttune.patch(model), inputs)
    torch.testing.assert_close(loss, stock)
    assert found.keys() == expected.keys()


def test_the_decoders_scale_is_the_modules_own():
    model = build("ModernBertDecoderForCausalLM")
    model.config.use_cache = False
    inputs = batch_of(model, padding="right")
    before, _ = gradients(copy.deepcopy(model), inputs)
    for layer in model.model.layers:
        layer.attn.scaling *= 4.0
    stock, _ = gradients(copy.deepcopy(model), inputs)
    assert abs(stock - before) > 1e-3
    torch.testing.assert_close(gradients(fasttune.patch(model), inputs)[0], stock)


def test_position_embeddings_of_another_length_are_stocks_error():
    model = fasttune.patch(build("ModernBertModel"))
    layer, hidden = model.layers[0], torch.randn(2, 5, 64)
    cos, sin = model.rotary_emb(hidden, torch.arange(10)[None], "full_attention")
    with pytest.raises(RuntimeError, match="must match the size"):
        layer(hidden, position_embeddings=(cos, sin))


@pytest.mark.parametrize(
    ("head", "name"),
    [
        *(("BertForMaskedLM", "BertSelfAttention"), ("GPT2LMHeadModel", "GPT2Attention")),
        *(("MPNetForMaskedLM", "MPNetSelfAttention"), ("DebertaV2ForMaskedLM", "DisentangledSelfAttention")),
        *(("DistilBertForMaskedLM", "DistilBertSelfAttention"), ("ModernBertForMaskedLM", "ModernBertAttention")),
        ("EsmForMaskedLM", "EsmSelfAttention"),
    ],
)
def test_attention_that_was_replaced_for_the_whole_process_is_called(monkeypatch, head, name):
    model = build(head)
    batch, ours = batch_of(model, padding="right"), fasttune.patch(copy.deepcopy(model))
    (cls,) = {cls for module in model.modules() for cls in type(module).__mro__ if cls.__name__ == name}
    shipped = cls.forward

    def larger(self, *args, **kwargs):
        out, *rest = shipped(self, *args, **kwargs)
        return (out * 1.5, *rest)

    monkeypatch.setattr(cls, "forward", larger)
    expected, actual = gradients(model, batch), gradients(ours, batch)
    torch.testing.assert_close(actual[0], expected[0])
    for key, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][key], gradient, rtol=1e-4, atol=1e-6, msg=key)
