"""Sliding windows: masks are recognised by their values, and tokens at padding see what stock's mask shows them."""

import itertools

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
@pytest.mark.parametrize("window", [1, 2, 5])
def test_every_token_sees_what_the_mask_shows_it(window, causal):
    """With the positions and options of the calls that it is made a query of; those that see nothing are left out."""
    found = layout(ROWS, window, causal)
    assert (found.window, found.causal) == (window, causal)
    mask, ids = mask_of(ROWS, window, causal)[:, 0], torch.arange(ROWS.numel())
    seen = {}
    for queries in queries_of(found, ids):
        sequences = torch.repeat_interleave(torch.arange(len(ROWS)), queries.counts)
        for which, sequence, position in zip(
            queries.which.tolist(), sequences.tolist(), queries.positions, strict=True
        ):
            assert which // LENGTH == sequence
            keys = torch.arange(int(found.lengths[sequence]))
            visible = keys >= 0
            if queries.causal:
                visible &= keys <= position
            if queries.window is not None:
                visible &= (keys - position).abs() <= queries.window
            assert which not in seen
            seen[which] = (keys[visible] + found.begins[sequence]).tolist()
        places = list(zip(sequences.tolist(), queries.positions.tolist(), strict=True))
        assert places == sorted(places)
    expected = {
        sequence * LENGTH + column: mask[sequence, column].nonzero().flatten().tolist()
        for sequence, column in itertools.product(range(len(ROWS)), range(LENGTH))
    }
    assert seen == {token: keys for token, keys in expected.items() if keys}
    assert found.blind == any(not keys for keys in expected.values())


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
