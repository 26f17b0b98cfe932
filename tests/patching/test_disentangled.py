"""DeBERTa: disentangled attention in all its kinds, and tokens at padding, which see no key and so weigh all alike."""

import copy

import pytest
import torch
from model_parity import check_models, note_errors, settle
from models import batch_of, build, copy_in, gradients
from torch import nn
from transformers.models.deberta_v2 import modeling_deberta_v2 as stock

import fasttune
from fasttune import ops
from fasttune.ops._random import repeating
from fasttune.patching.layers.frozen import Unknown
from fasttune.patching.layers.real_keys import over_all_columns
from fasttune.patching.layers.relative import ByDistance
from fasttune.patching.padding.layout import layout_of

CPU = torch.device("cpu")
KINDS = {
    "v2": {
        "share_att_key": False,
        "position_buckets": -1,
        "max_relative_positions": 6,  # distances of 13 tokens reach further
        "norm_rel_ebd": "none",
        "type_vocab_size": 2,
        "position_biased_input": True,
    },
    "only c2p": {"pos_att_type": ["c2p"]},
    "only p2c": {"pos_att_type": ["p2c"], "share_att_key": False},
    "neither": {"pos_att_type": []},
    "not relative": {"relative_attention": False, "position_biased_input": True},
    "few buckets": {"position_buckets": 8, "max_relative_positions": 10},
    "more than are reached": {"position_buckets": 32},
    "a projection of embeddings": {"embedding_size": 32},
    "a convolution": {"conv_kernel_size": 3, "conv_act": "gelu"},
    "the new head": {"legacy": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(kind):
    model = check_models(
        lambda seed: build("DebertaV2ForMaskedLM", seed=seed, **KINDS[kind]),
        torch.float32,
        {"batch": 3, "padding": "right"},
    )
    assert rows_of(model)["(layers)"].calls == 2


def rows_of(model):
    return {row.modules: row for row in fasttune.report(model).rows}


READERS = {
    "every row": lambda out, real: {"last": out.last_hidden_state},
    "padding alone": lambda out, real: {"padding": out.last_hidden_state[~real]},
    "one token": lambda out, real: {"one": out.last_hidden_state[1, -1], "another": out.last_hidden_state[1, 0]},
    "every layer": lambda out, real: {f"layer {i}": x + 0.0 for i, x in enumerate(out.hidden_states)},
    "from the first": lambda out, real: {f"layer {i}": out.hidden_states[i][~real] for i in (1, 2)},
    "from the last": lambda out, real: {f"layer {i}": out.hidden_states[i][~real] for i in (2, 1)},
}


def read_by(model, inputs, reader):
    """What a reader sees of the hidden states, and the gradients of a function of that."""
    out = model(**inputs, output_hidden_states=True)
    values = READERS[reader](out, inputs["attention_mask"].bool())
    values = {name: value + 0.0 for name, value in values.items()}
    if not torch.is_grad_enabled():
        return values
    model.zero_grad(set_to_none=True)
    sum((x * torch.linspace(-1, 1, x.numel()).to(x.dtype).view_as(x)).sum() for x in values.values()).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {name: value.detach() for name, value in values.items()} | found


def check_reader(reader, padding, *, options=None, training=True, **changes):
    def draw(errors, seed):
        model = build("DebertaV2Model", seed=seed, **changes).train(training)
        inputs = batch_of(model, batch=3, length=9, padding=padding, seed=seed + 1)
        if padding == "nothing real":
            inputs["attention_mask"][1] = 0
        models = copy_in(model, torch.float64), copy_in(model, torch.float32), fasttune.patch(model, **(options or {}))
        with torch.set_grad_enabled(training):
            exact, theirs, ours = (read_by(each, inputs, reader) for each in models)
        assert ours.keys() == theirs.keys()
        note_errors(errors, ours, (theirs,), exact)
        packed = padding != "scattered" and options is None
        assert rows_of(model)["(layers)"].calls == (2 if packed else 0)

    settle(draw)


@pytest.mark.parametrize("padding", ["right", "left", "scattered", "nothing real"])
@pytest.mark.parametrize("reader", READERS)
def test_rows_at_padding(reader, padding):
    check_reader(reader, padding)


@pytest.mark.parametrize("reader", ["every layer", "from the last"])
def test_rows_at_padding_in_evaluation(reader):
    check_reader(reader, "left", training=False)


@pytest.mark.parametrize("padding", ["right", "nothing real"])
@pytest.mark.parametrize("kind", ["v2", "only p2c", "not relative"])
def test_layers_that_run_as_they_stand(kind, padding):
    check_reader("every row", padding, options={"packing": False, "trim": False}, **KINDS[kind])


def test_scattered_padding_is_packed_where_no_distance_counts():
    model = fasttune.patch(build("DebertaV2ForMaskedLM", **KINDS["neither"]))
    gradients(model, batch_of(model, padding="scattered"))
    assert rows_of(model)["(packing)"].calls == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int32])
def test_masks_of_any_dtype(dtype):
    model = build("DebertaV2ForMaskedLM")
    inputs = batch_of(model, padding="right")
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    same_as_stock(model, inputs, packed=True)


# Dropout


@pytest.fixture
def model():
    return build("DebertaV2Model", dropout=0.3)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("reader", READERS)
def test_dropout_is_that_of_the_call(model, reader, padding):
    """Whether layers are packed, and whoever reads first: one seed is one set of masks."""
    inputs = batch_of(model, batch=3, length=9, padding=padding)
    found = []
    for options in ({}, {"packing": False, "trim": False}):
        fasttune.patch(model, **options)
        torch.manual_seed(5)
        found.append(read_by(model, inputs, reader))
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, rtol=1e-4, atol=2e-5, msg=name)


def test_rows_read_late_are_those_of_the_call(model):
    inputs = batch_of(model, batch=3, length=9, padding="right")
    fasttune.patch(model)
    torch.manual_seed(5)
    at_once = model(**inputs).last_hidden_state + 0.0
    torch.manual_seed(5)
    out = model(**inputs).last_hidden_state
    torch.manual_seed(6)
    model.eval()
    real = inputs["attention_mask"].bool()
    for place in ((1, -1), (2, 0), (1, -2)):
        torch.testing.assert_close(out[place] + 0.0, at_once[place])
    torch.testing.assert_close(out[~real] + 0.0, at_once[~real])
    assert not torch.allclose(at_once, model(**inputs).last_hidden_state, atol=1e-2)


def test_dropout_of_a_row_at_padding_scales_what_it_keeps():
    """With values that are all ones and weights that are all alike, kept ones are counted."""
    model = build("DebertaV2Model")
    attention = model.encoder.layer[0].attention.self
    attention.dropout.p = 0.25
    with torch.no_grad():
        attention.value_proj.weight.zero_()
        attention.value_proj.bias.fill_(1.0)
    fasttune.patch(model)
    hidden, mask = torch.randn(4, 64, 64), torch.ones(4, 64)
    mask[:, 40:] = 0
    relative, table = model.encoder.get_rel_pos(hidden), model.encoder.get_rel_embedding()
    mask = model.encoder.get_attention_mask(mask)
    out, _ = attention(hidden, mask, relative_pos=relative, rel_embeddings=table)
    counts = out[:, 40:, ::16] * 64 * 0.75
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-3)
    assert abs(counts.mean() - 48) < 1.0
    assert counts.unique().numel() > 8


def test_a_row_at_padding_has_dropout_of_its_own():
    """On the left its column is the position of a real one."""
    real = torch.arange(32) >= 16
    mask = (real[:, None] & real)[None, None]
    layout = layout_of(mask, (1, 32), CPU, causal=False, both_real=True)
    columns, nothing = torch.eye(32)[:, None], torch.zeros(16, 1, 32)
    options = {"cu_seqlens": layout.packed.cu_seqlens, "max_seqlen": 16, "dropout_p": 0.5, "backend": None}
    seed = []
    with repeating(seed):
        seen = ops.attention(nothing, nothing, columns[:16], **options)
    with repeating(seed):
        blind = over_all_columns(torch.arange(16), columns[16:], columns[:16], layout, options)
    kept = [(weights[:, 0, :16] > 0).float() for weights in (seen, blind)]
    assert ((kept[0] - kept[1]).abs().mean() - 0.5).abs() < 0.15


def test_the_embeddings_of_distances_are_dropped_out():
    model = build("DebertaV2Model")
    for layer in model.encoder.layer:
        layer.attention.self.pos_dropout.p = 0.5
    inputs = batch_of(model, padding="right")
    fasttune.patch(model)
    first, again = (model(**inputs).last_hidden_state[0] + 0.0 for _ in range(2))
    assert not torch.allclose(first, again, atol=1e-3)
    model.eval()
    first, again = (model(**inputs).last_hidden_state[0] + 0.0 for _ in range(2))
    torch.testing.assert_close(first, again)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    """Reentrant, a table that is normalised is stock's error, for its graph is run through by each layer."""
    model = build("DebertaV2ForMaskedLM", dropout=0.2, norm_rel_ebd="none" if reentrant else "layer_norm")
    inputs = batch_of(model, padding="right")
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        fasttune.patch(model)
        torch.manual_seed(3)
        found.append(gradients(model, inputs)[1])
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)


# What is not known runs as stock


def same_as_stock(model, inputs, change=lambda model: None, *, packed=False):
    results = []
    for either in (model, fasttune.patch(copy.deepcopy(model))):
        change(either)
        loss, found = gradients(either, inputs)
        results.append({"loss": loss, **found})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)
    assert bool(rows_of(either)["(layers)"].calls) == packed


def _instance(name):
    def change(model):
        for layer in model.deberta.encoder.layer:
            attention = layer.attention.self
            method = getattr(attention, name)
            setattr(attention, name, lambda *args, method=method: method(*args) * 1.5)

    return change


def _hook(model):
    for layer in model.deberta.encoder.layer:
        layer.attention.self.pos_dropout.register_forward_hook(lambda module, args, out: out * 1.5)


def _positions_by_content(model):
    encoder = model.deberta.encoder
    shipped = encoder.get_rel_pos

    def other(*args):
        found = shipped(*args).clone()
        found[0, 2, 3] += 1
        return found

    encoder.get_rel_pos = other


def _one_sided(model):
    encoder = model.deberta.encoder
    shipped = encoder.get_rel_pos
    encoder.get_rel_pos = lambda *args: shipped(*args).clamp(min=0)


def _causal(model):
    encoder = model.deberta.encoder
    shipped = encoder.get_attention_mask
    encoder.get_attention_mask = lambda mask: shipped(mask).tril()


def _another_layer(model):
    for layer in model.deberta.encoder.layer:
        layer.attention.self.pos_dropout = nn.Identity()


CHANGES = {
    "a method of an instance": _instance("disentangled_attention_bias"),
    "another method": _instance("transpose_for_scores"),
    "a hook": _hook,
    "positions that are no distances": _positions_by_content,
    "positions that differ by side": _one_sided,
    "a mask of another kind": _causal,
    "another dropout": _another_layer,
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_known_runs_as_stock(name):
    model = build("DebertaV2ForMaskedLM")
    same_as_stock(model, batch_of(model, padding="right"), CHANGES[name])


@pytest.mark.parametrize("name", ["disentangled_attention_bias", "build_rpos"])
def test_what_was_replaced_for_the_whole_process_is_called(monkeypatch, name):
    of = stock if name == "build_rpos" else stock.DisentangledSelfAttention
    shipped = getattr(of, name)
    monkeypatch.setattr(of, name, lambda *args: shipped(*args) * 2)
    model = build("DebertaV2ForMaskedLM")
    same_as_stock(model, batch_of(model, padding="right"))


def test_who_sees_to_one_side_alone_is_packed_with_one_term():
    model = build("DebertaV2ForMaskedLM", **KINDS["only c2p"])
    same_as_stock(model, batch_of(model, padding="right"), _one_sided, packed=True)


def test_queries_of_other_states():
    """As an enhanced mask decoder calls a layer."""
    model = build("DebertaV2Model")
    x, query = torch.randn(2, 3, 7, 64).unbind()
    relative, table = model.encoder.get_rel_pos(x), model.encoder.get_rel_embedding()
    mask = model.encoder.get_attention_mask(torch.ones(3, 7))
    arguments = {"query_states": query, "relative_pos": relative, "rel_embeddings": table}
    expected, _ = model.encoder.layer[0](x, mask, **arguments)
    found, _ = fasttune.patch(copy.deepcopy(model)).encoder.layer[0](x, mask, **arguments)
    torch.testing.assert_close(found, expected)


def test_attention_weights_are_handed_out():
    model = build("DebertaV2Model").eval()
    inputs = batch_of(model, padding="right")
    expected = model(**inputs, output_attentions=True)
    actual = fasttune.patch(copy.deepcopy(model))(**inputs, output_attentions=True)
    for ours, theirs in zip(actual.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("legacy", [True, False])
def test_the_loss_goes_without_logits(legacy, monkeypatch):
    model = fasttune.patch(build("DebertaV2ForMaskedLM", legacy=legacy))
    inputs = batch_of(model, padding="right")
    out = model(**inputs)
    with torch.no_grad():
        expected = nn.functional.cross_entropy((out.logits + 0.0).flatten(0, 1), inputs["labels"].flatten())
    torch.testing.assert_close(out.loss.detach(), expected)
    assert type(out.logits).__name__ == "PromisedRows"


# The parts


@pytest.mark.parametrize("longest", [1, 5, 13])
@pytest.mark.parametrize(("buckets", "furthest"), [(-1, 6), (4, 48), (8, 10), (32, 48)])
def test_every_pair_gets_stocks_embedding(buckets, furthest, longest):
    x = torch.empty(1, 13, 4)
    pairs = stock.build_relative_position(x, x, bucket_size=buckets, max_position=furthest)
    span = buckets if buckets > 0 else furthest
    positions = ByDistance.of(pairs, torch.randn(2 * span, 4), 13)
    cut = positions.distances.cut(longest, span, c2p=True, p2c=True)
    assert 0 <= cut.begin < cut.end <= 2 * span
    assert cut.end - cut.begin == 2 * span or cut.end - cut.begin < 2 * longest + 7
    assert 0 <= int(cut.buckets.min()) <= int(cut.buckets.max()) < cut.end - cut.begin
    tokens = torch.arange(longest)
    ours = cut.buckets[tokens - tokens[:, None] + longest - 1].long() + cut.begin
    pairs = pairs[0, :longest, :longest]
    assert torch.equal(ours, (pairs + span).clamp(0, 2 * span - 1))
    assert torch.equal(ours, (span - pairs).clamp(0, 2 * span - 1).t())


def test_one_sided_positions_are_told_apart():
    pairs = (torch.arange(5)[:, None] - torch.arange(5)).clamp(min=0)[None]
    distances = ByDistance.of(pairs, torch.randn(12, 4), 5).distances
    for terms in ({"c2p": True, "p2c": False}, {"c2p": False, "p2c": True}):
        assert distances.cut(5, 6, **terms).buckets.numel() == 9
    with pytest.raises(Unknown):
        distances.cut(5, 6, c2p=True, p2c=True)


def test_the_mask_is_asked_for_and_compared():
    real = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]])
    mask = (real[:, :, None] * real[:, None])[:, None]
    found = layout_of(mask, (4, 4), CPU, causal=False, both_real=True)
    assert found.blind_sees_all
    assert found.real.equal(real.bool())
    assert layout_of(mask.bool(), (4, 4), CPU, causal=False) is None
    other = mask.clone()
    other[0, 0, 3, 3] = 1
    assert layout_of(other, (4, 4), CPU, causal=False, both_real=True) is None
    assert not layout_of(torch.ones(4, 1, 4, 4), (4, 4), CPU, causal=False, both_real=True).blind_sees_all
