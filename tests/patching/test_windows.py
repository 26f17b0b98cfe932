"""Sliding windows: masks are recognised by their values, and tokens at padding see what stock's mask shows them."""

import pytest
import torch
from models import batch_of, build, gradients

import fasttune
from fasttune.patching.padding.layout import layout_of
from fasttune.patching.padding.queries import queries_of

CPU = torch.device("cpu")
LENGTH = 7
# A row without padding, padding behind, in front, on both sides, and of one token.
ROWS = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 1],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
    ],
    dtype=torch.bool,
)


def mask_of(real, window, causal):
    """bool (B, 1, S, S)."""
    tokens = torch.arange(real.shape[1])
    distance = tokens - tokens[:, None]
    near = distance.abs() <= window
    return (near & (distance <= 0) if causal else near)[None, None] & real[:, None, None]


def layout(real, window, causal, asked=None):
    return layout_of(
        mask_of(real, window, causal), tuple(real.shape), CPU, causal=False, window=window if asked is None else asked
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 2, 5, None])
def test_every_token_sees_what_the_mask_shows_it(window, causal):
    """With the position that it is made a query at, as far from the keys as its column is."""
    mask = mask_of(ROWS, LENGTH if window is None else window, causal)
    found = layout_of(mask, tuple(ROWS.shape), CPU, causal=False, window=window)
    assert (found.window, found.causal, found.side_by_side) == (window, causal, True)
    mask, queries = mask[:, 0], queries_of(found, torch.arange(ROWS.numel()))
    sequences = torch.repeat_interleave(torch.arange(len(ROWS)), queries.counts)
    places = list(zip(sequences.tolist(), queries.positions.tolist(), strict=True))
    assert places == sorted(places)
    assert queries.which.sort().values.equal(torch.arange(ROWS.numel()))
    blind = False
    for which, (sequence, position) in zip(queries.which.tolist(), places, strict=True):
        assert which // LENGTH == sequence
        assert position == which % LENGTH - found.begins[sequence]
        keys = torch.arange(int(found.lengths[sequence]))
        ahead = keys - position
        seen = keys[(ahead.abs() <= (LENGTH if window is None else window)) & ((ahead <= 0) | (not causal))]
        assert (seen + found.begins[sequence]).tolist() == mask[sequence, which % LENGTH].nonzero().flatten().tolist()
        blind |= not len(seen)
    assert found.blind == blind


@pytest.mark.parametrize("causal", [False, True])
def test_with_holes_every_token_sees_as_many_keys_as_the_mask_shows_it(causal):
    real = ROWS.clone()
    real[0, 3] = False
    real[1] = torch.tensor([0, 1, 0, 1, 1, 0, 0])
    mask = mask_of(real, LENGTH, causal)
    found = layout_of(mask, tuple(real.shape), CPU, causal=False)
    assert not found.side_by_side
    queries = queries_of(found, torch.arange(real.numel()))
    for which, position in zip(queries.which.tolist(), queries.positions.tolist(), strict=True):
        sequence, column = divmod(which, LENGTH)
        count = int(found.lengths[sequence])
        seen = min(max(position + 1, 0), count) if causal else count
        assert seen == int(mask[sequence, 0, column].sum())


def test_a_window_that_the_mask_does_not_show_is_not_taken():
    assert layout(ROWS, 2, False, asked=3) is None
    assert layout(ROWS[:1], 2, False, asked=1) is None
    assert layout_of(mask_of(ROWS, 2, False), tuple(ROWS.shape), CPU, causal=False) is None


def test_a_window_as_wide_as_the_row_is_none():
    found = layout(ROWS, LENGTH, False)
    assert found.window is None
    assert found.real.equal(ROWS)


def test_holes_change_distances():
    real = ROWS.clone()
    real[0, 3] = False
    assert layout(real, 2, False) is None


@pytest.mark.parametrize("padding", ["right", "left"])
def test_layers_with_and_without_a_window_are_packed(padding):
    model = fasttune.patch(build("ModernBertForMaskedLM"))
    gradients(model, batch_of(model, batch=4, padding=padding))
    rows = {row.modules: row for row in fasttune.report(model).rows}
    assert rows["(packing)"].calls == rows["(layers)"].calls == 3
    assert rows["(packing)"].note == ""
