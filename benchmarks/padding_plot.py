"""Speed-up against fill ratio: how much of a padded batch is real tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from style import FASTTUNE, GREY, INK


def rows_by_fill(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [record for record in records if "by fill" in record["shape"] and "speedup" in record]
    return sorted(rows, key=lambda row: row["fill"])


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = rows_by_fill(records)
    fills = [100 * row["fill"] for row in rows]
    peers = [row["peers"][row["best_peer"]] for row in rows]
    figure, axes = plt.subplots(figsize=(6, 3.6))
    lows, highs = [peer["ratio_low"] for peer in peers], [peer["ratio_high"] for peer in peers]
    axes.fill_between(fills, lows, highs, color=FASTTUNE, alpha=0.2, lw=0)
    axes.plot(fills, [peer["ratio"] for peer in peers], color=FASTTUNE, marker="o", label="fasttune, whole step")
    axes.plot(fills, [100 / fill for fill in fills], color=GREY, ls=":", label="1 / fill")
    axes.axhline(1.0, color=INK, lw=0.8)
    axes.set(xlabel="real tokens, % of the padded batch", ylabel="times faster than the better stock attention")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
