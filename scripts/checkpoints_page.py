"""Writes the table of docs/checkpoints.md from tests/patching/checkpoints.py.

    python scripts/checkpoints_page.py

The rest of the page is kept. A test compares the two.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "patching")]

from checkpoints import CHECKPOINTS  # noqa: E402
from transformers import logging  # noqa: E402

PAGE = ROOT / "docs" / "checkpoints.md"
BEGIN, END = "<!-- python scripts/checkpoints_page.py writes this -->", "<!-- up to here -->"
HEADING = """| checkpoint | family | loaded as | layers × width | heads × dimension | exceptions |
|---|---|---|--:|--:|---|"""


def exceptions(config: Any) -> str:
    """Where what runs is less than the family's full set."""
    found = []
    if config.model_type == "esm" and config.position_embedding_type != "rotary":
        found.append("learned positions: no rotary embedding")
    if getattr(config, "conv_kernel_size", 0):
        found.append("the convolution behind the first layer takes all rows of it")
    dropouts = ("hidden_dropout_prob", "embedding_dropout", "dropout", "embd_pdrop")
    if not any(getattr(config, name, 0.0) for name in dropouts):
        found.append("no dropout")
    return "; ".join(found)


def row(checkpoint: Any) -> str:
    config = checkpoint.of_class()
    width, heads = config.hidden_size, config.num_attention_heads
    cells = (
        f"`{checkpoint.name}`",
        checkpoint.model_type,
        f"`{checkpoint.loaded_as}`",
        f"{config.num_hidden_layers} × {width}",
        f"{heads} × {width // heads}",
        exceptions(config),
    )
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def table() -> str:
    rows = sorted(CHECKPOINTS, key=lambda checkpoint: (checkpoint.model_type, checkpoint.name.lower()))
    return "\n".join([HEADING, *map(row, rows)])


def main() -> None:
    logging.set_verbosity_error()  # ids beyond the vocabulary are the checkpoint's affair
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
