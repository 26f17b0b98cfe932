"""Speed-up against fill ratio, from the JSON of a benchmark run.

pytest benchmarks/test_padding_speed.py --benchmark-only --benchmark-json out/padding.json
python benchmarks/padding_plot.py out/padding.json out/padding.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from report import FASTTUNE, GREY, INK, load


def plot(records: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    rows = sorted((r for r in records if "by fill" in r["shape"] and "speedup" in r), key=lambda r: r["fill"])
    fills = [100 * row["fill"] for row in rows]
    peers = [row["peers"][row["best_peer"]] for row in rows]
    figure, axes = plt.subplots(figsize=(6, 3.6))
    axes.fill_between(
        fills, [p["ratio_low"] for p in peers], [p["ratio_high"] for p in peers], color=FASTTUNE, alpha=0.2, lw=0
    )
    axes.plot(fills, [p["ratio"] for p in peers], color=FASTTUNE, marker="o", label="fasttune, whole step")
    axes.plot(fills, [100 / fill for fill in fills], color=GREY, ls=":", label="1 / fill")
    axes.axhline(1.0, color=INK, lw=0.8)
    axes.set(xlabel="real tokens, % of the padded batch", ylabel="times faster than the faster stock attention", ylim=0)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    plot(load(Path(sys.argv[1]))[1], Path(sys.argv[2]))
