"""Turns the JSON of a benchmark run into a Markdown page with plots.

    pytest benchmarks/ --benchmark-only --benchmark-json out/benchmarks.json
    python benchmarks/report.py out/benchmarks.json --out out

writes out/benchmarks.md and its plots beside it. A run may be in several files, such as operations in one and training
steps in another; where a row is in two of them, the later file counts. `--keep DIR` also writes the figures of each
file there, without what pytest-benchmark adds: that is what benchmarks/results/ holds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import padding_plot
from style import FASTTUNE, GREY, INK, STOCK

STEP, FRAMEWORK, OVERHEAD = "training step", "in a framework", "overhead"

METHOD = """\
Every row is a race in one process: each round runs every peer once, the needed matrix products once, and fasttune
once. Times are medians over the rounds; a ratio is the median of the ratios within the rounds, with its quartiles, so
that drift of the machine cancels. *Needed products* are the linear layers' and attention's products that the work
cannot do without (`benchmarks/needed.py`, `products.py`), timed through torch at exactly their shapes in the same
rounds: 1.00× is the limit. GB/s is the least traffic the work needs (inputs and output forward; inputs, upstream
gradient and gradients backward) over fasttune's time. Extra memory is a step's peak beyond inputs, output and
gradients, each side in a process of its own."""


def ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def mb(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e6:,.0f} MB"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def load(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The machines, each once, and a flat record for each row that finished."""
    machines: list[dict[str, Any]] = []
    records: dict[str, dict[str, Any]] = {}
    for path in paths:
        data = json.loads(path.read_text())
        machine = data["machine_info"].get("fasttune", {})
        machines.append(machine)
        for row in data["benchmarks"]:
            if "group" in row["extra_info"]:
                median_ms = 1e3 * row["stats"]["median"]
                records[row["name"]] = row["extra_info"] | {
                    "name": row["name"],
                    "median_ms": median_ms,
                    "machine": machine,
                }
    return machines, list(records.values())


def keep(path: Path, folder: Path) -> None:
    """The figures of a run and what they were measured on, without host and commit."""
    data = json.loads(path.read_text())
    rows = [
        {"name": row["name"], "stats": {"median": row["stats"]["median"]}, "extra_info": row["extra_info"]}
        for row in data["benchmarks"]
    ]
    kept = {"machine_info": {"fasttune": data["machine_info"].get("fasttune", {})}, "benchmarks": rows}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / path.name).write_text(json.dumps(kept, indent=1) + "\n")


def step_table(records: Sequence[dict[str, Any]]) -> str:
    rows = []
    for record in records:
        best = record["peers"][record["best_peer"]]
        rows.append(
            [
                f"{record['shape']}",
                record["dtype"],
                ms(record["ours_ms"]),
                ", ".join(f"{name.removeprefix('stock ')} {ms(peer['ms'])}" for name, peer in record["peers"].items()),
                f"**{best['ratio']:.2f}×** ({best['ratio_low']:.2f}–{best['ratio_high']:.2f})",
                ms(record["products_ms"]),
                f"**{record['over_products']:.2f}×**",
                f"{best['over_products']:.2f}×",
                str(record["rounds"]),
            ]
        )
    header = ["step", "dtype", "fasttune", "stock", "faster than the better one", "needed products"]
    return markdown_table([*header, "fasttune ÷ products", "stock ÷ products", "rounds"], rows)


def framework_table(records: Sequence[dict[str, Any]]) -> str:
    rows = []
    for record in records:
        best = record["peers"][record["best_peer"]]
        told = ", ".join(f"{name.removeprefix('stock ')} {ms(peer['ms'])}" for name, peer in record["peers"].items())
        ratio = f"**{best['ratio']:.2f}×** ({best['ratio_low']:.2f}–{best['ratio_high']:.2f})"
        rows.append([record["shape"], record["dtype"], ms(record["ours_ms"]), told, ratio, str(record["rounds"])])
    header = ["work", "dtype", "fasttune", "stock", "faster than the better one", "rounds"]
    return markdown_table(header, rows)


def operation_table(records: Sequence[dict[str, Any]]) -> str:
    rows = []
    for record in records:
        memory = record.get("extra_memory", {})
        for number, (name, peer) in enumerate(record["peers"].items()):
            extra = f"{mb(memory.get('fasttune'))} / {mb(memory.get(name))}" if memory else ""
            rows.append(
                [
                    f"`{record['group']}`" if number == 0 else "",
                    record["shape"] if number == 0 else "",
                    record["dtype"] if number == 0 else "",
                    ms(record["ours_ms"]) if number == 0 else "",
                    name,
                    ms(peer["ms"]),
                    f"**{peer['ratio']:.2f}×** ({peer['ratio_low']:.2f}–{peer['ratio_high']:.2f})",
                    f"{record['over_products']:.2f}×" if "over_products" in record and number == 0 else "",
                    f"{record['gb_per_s']:.1f}" if "gb_per_s" in record and number == 0 else "",
                    extra,
                ]
            )
    header = ["operation", "shape", "dtype", "fasttune", "peer", "peer's time", "faster", "÷ products", "GB/s"]
    return markdown_table([*header, "extra memory, fasttune / peer"], rows)


def memory_table(records: Sequence[dict[str, Any]]) -> str:
    rows = []
    for record in records:
        peaks = record["peak_memory"]
        ours = peaks["fasttune"]
        peers = {name: peak for name, peak in peaks.items() if name != "fasttune"}
        told = ", ".join(f"{name.removeprefix('stock ')} {mb(peak)}" for name, peak in peers.items())
        rows.append([record["shape"], mb(ours), told, f"{min(peers.values()) / ours:.1f}×"])
    return markdown_table(["step", "fasttune", "stock", "the better one ÷ fasttune"], rows)


def memory_part(records: Sequence[dict[str, Any]]) -> list[str]:
    measured = [record for record in records if "peak_memory" in record]
    if not measured:
        return []
    return ["Peak memory of a step beyond weights, gradients and optimizer state:", memory_table(measured)]


def overhead_table(records: Sequence[dict[str, Any]]) -> str:
    rows = [
        [f"`{record['shape']}`", *(f"{record[key]:.0f} µs" for key in ("overhead_us", "kernel_us", "layer_norm_us"))]
        for record in records
    ]
    return markdown_table(
        ["forward call", "beyond its kernel", "its kernel", "all of `F.layer_norm`, same rounds"], rows
    )


def machine_lines(machines: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each kind of machine; its speed, measured at the start of every run, as a range."""
    speeds: dict[str, list[float]] = {}
    for machine in machines:
        kind = (
            f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']} "
            f"({machine['torch_cpu_capability']}), transformers {machine['transformers']}, Python {machine['python']}, "
            f"fasttune on {machine['fasttune_isa']}"
        )
        speeds.setdefault(kind, []).append(machine["matmul_gflops"])
    return [
        f"{kind}; a 1536³ fp32 matrix product ran at {'–'.join(f'{x:.0f}' for x in sorted({min(found), max(found)}))}"
        " GFLOP/s."
        for kind, found in speeds.items()
    ]


def page(machines: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]) -> str:
    steps = [record for record in records if record["group"] == STEP]
    overhead = [record for record in records if record["group"] == OVERHEAD]
    frameworks = [record for record in records if record["group"] == FRAMEWORK]
    operations = [record for record in records if record["group"] not in (STEP, FRAMEWORK, OVERHEAD)]
    parts = ["# Benchmarks"]
    if any(machine.get("quick") for machine in machines):
        parts.append("**A quick run on tiny shapes: it tries the harness, the figures mean nothing.**")
    parts += [METHOD, "Reproduce with `make bench`."]
    if steps:
        parts += [
            "## Training steps",
            *machine_lines([record["machine"] for record in steps]),
            "Zero gradients, forward, backward, fused AdamW; default configurations (dropout 0.1 where they have any),"
            " random weights.",
            "![step time over needed matrix products](benchmarks-steps.png)",
            step_table(steps),
        ]
        if padding_plot.rows_by_fill(steps):
            parts.append("![speed-up against fill](benchmarks-fill.png)")
        parts += memory_part(steps)
    if frameworks:
        parts += [
            "## In frameworks",
            *machine_lines([record["machine"] for record in frameworks]),
            "Steps of sentence-transformers, TRL, Trainer's label smoothing (0.0: the model's own loss) and an"
            " encoder-decoder, from the collated batch to fused AdamW, and `encode`; default configurations (dropout"
            " 0.1), random weights. Rerankers tokenize inside of their loss, `encode` tokenizes too.",
            framework_table(frameworks),
            *memory_part(frameworks),
        ]
    if operations:
        parts += ["## Operations, forward and backward", *machine_lines([record["machine"] for record in operations])]
        parts.append("![speed-ups](benchmarks-operations.png)")
        parts.append(operation_table(operations))
    if overhead:
        parts += [
            "## Overhead of a call",
            *machine_lines([record["machine"] for record in overhead]),
            "Dispatch, checks and autograd, on inputs of a few numbers that require gradients; medians.",
        ]
        parts.append(overhead_table(overhead))
    return "\n\n".join(parts) + "\n"


def _figure(rows: int, width: float = 9.0) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    )
    figure, axis = plt.subplots(figsize=(width, 1.1 + 0.34 * rows))
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=GREY, alpha=0.25, linewidth=0.8)
    axis.set_axisbelow(True)
    return figure, axis


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _label(axis: Any, x: float, y: float, colour: str, *, left: bool = False) -> None:
    axis.annotate(
        f"{x:.2f}×",
        (x, y),
        xytext=(-5 if left else 5, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        color=colour,
        fontweight="bold",
    )


def plot_steps(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Two bars a step: the better stock side and fasttune, in units of the needed matrix products."""
    figure, axis = _figure(2 * len(records) + 1)
    for row, record in enumerate(reversed(records)):
        best = record["peers"][record["best_peer"]]
        bars = ((0.19, best["over_products"], STOCK, "stock"), (-0.19, record["over_products"], FASTTUNE, "fasttune"))
        for offset, value, colour, label in bars:
            axis.barh(row + offset, value, height=0.36, color=colour, label=label if row == 0 else None)
            _label(axis, value, row + offset, colour)
    axis.axvline(1.0, color=INK, linewidth=1.2)
    axis.set_yticks(range(len(records)), [f"{record['shape']}\n{record['dtype']}" for record in reversed(records)])
    axis.set_xlabel("step time ÷ time of its needed matrix products (1.00 is the limit)")
    axis.set_xlim(right=1.12 * max(axis.get_xlim()[1], 1.0))
    figure.legend(frameon=False, loc="upper right", ncols=2)
    _save(figure, path)


def plot_operations(records: Sequence[dict[str, Any]], path: Path) -> None:
    """A bar a row, from "as fast as" to how many times faster than its fastest peer, on a logarithmic scale."""
    figure, axis = _figure(len(records))
    axis.set_xscale("log")
    ratios = [record["peers"][record["best_peer"]]["ratio"] for record in reversed(records)]
    for row, ratio in enumerate(ratios):
        colour = FASTTUNE if ratio >= 1 else STOCK
        axis.barh(row, ratio - 1, left=1, height=0.7, color=colour)
        _label(axis, ratio, row, colour, left=ratio < 1)
    axis.axvline(1.0, color=INK, linewidth=1.2)
    labels = [f"{record['group']}  {record['shape']}  {record['dtype']}" for record in reversed(records)]
    axis.set_yticks(range(len(records)), labels, fontsize=8.5)
    low, high = 0.7 * min(*ratios, 1.0), 1.5 * max(*ratios, 1.0)
    ticks = [2.0**power for power in range(-6, 8) if low <= 2.0**power <= high]
    axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("times faster than its fastest peer, forward and backward")
    axis.set_ylim(-0.7, len(records) - 0.3)
    axis.set_xlim(low, high)
    _save(figure, path)


def write(sources: Sequence[Path], out: Path) -> Path:
    machines, records = load(sources)
    out.mkdir(parents=True, exist_ok=True)
    steps = [record for record in records if record["group"] == STEP]
    operations = [record for record in records if record["group"] not in (STEP, FRAMEWORK, OVERHEAD)]
    if steps:
        plot_steps(steps, out / "benchmarks-steps.png")
        if padding_plot.rows_by_fill(steps):
            padding_plot.plot(steps, out / "benchmarks-fill.png")
    if operations:
        plot_operations(operations, out / "benchmarks-operations.png")
    (out / "benchmarks.md").write_text(page(machines, records))
    return out / "benchmarks.md"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the page and its plots")
    parser.add_argument("--keep", type=Path, help="folder for the figures alone, to be committed")
    args = parser.parse_args(argv)
    if args.keep is not None:
        for path in args.json:
            keep(path, args.keep)
    print(write(args.json, args.out))


if __name__ == "__main__":
    main()
