"""Recomputes every number printed in docs/dropout.md, by the scalar reference, in torch and in the compiled library."""

import re
from pathlib import Path

import pytest
import torch

from fasttune import ops
from fasttune.ops._reference import philox
from fasttune.ops.dropout import _dropout

PAGE = (Path(__file__).parents[1] / "docs" / "dropout.md").read_text()
WORD = 0xFFFFFFFF


def block(name):
    (text,) = re.findall(rf"```{name}\n(.*?)```", PAGE, re.DOTALL)
    return [line.split() for line in text.strip().splitlines()[1:]]


@pytest.mark.parametrize("row", block("philox"))
def test_words(row):
    words = [int(word, 16) for word in row]
    assert philox.philox4x32(tuple(words[:4]), tuple(words[4:6])) == tuple(words[6:])


def coordinates(domain, text):
    first, _, second = text.partition(",")
    return (int(first) & WORD, int(first) >> 32) if domain == 0 else (int(first), int(second))


@pytest.mark.parametrize("row", block("masks"), ids=lambda row: " ".join(row[:5]))
def test_masks(row):
    seed, domain, first, expected = int(row[0]), int(row[1]), int(row[4]), [bit == "1" for bit in row[5]]
    p, (c1, c2) = float(row[3]), coordinates(domain, row[2])
    threshold = int(65536 * p + 0.5)

    def kept(column):
        counter = (16 * (column // 128) + column % 16, c1, c2, domain)
        word = philox.philox4x32(counter, (seed & WORD, (seed >> 32) & WORD))[column % 128 // 32]
        return (word >> (16 * (column % 32 // 16))) & 0xFFFF >= threshold

    columns = range(first, first + len(expected))
    assert [kept(column) for column in columns] == expected
    seed_tensor, size = torch.tensor([seed]), first + len(expected)
    mask = philox.keep_mask(torch.tensor([c1]), torch.tensor([c2]), domain, size, seed_tensor, p)
    assert mask[0, first:].tolist() == expected
    if domain == 0 and "cpp" in ops.available_backends("dropout"):
        out = _dropout(torch.ones(1, size), None, torch.tensor([int(row[2])]), seed_tensor, p, "cpp")
        assert (out[0, first:] != 0).tolist() == expected
        assert out.max().item() == pytest.approx(65536 / (65536 - threshold), rel=1e-7)
