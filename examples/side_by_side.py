"""Two trainings of one model, taking turns step by step in one process; how they compare, and the picture of it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

INK, GREY, STOCK, FASTTUNE = "#1f2430", "#8a8f98", "#c0653a", "#1c7c7d"


class Side:
    """One model with its own optimizer, schedule and generator state: it trains as if it were alone."""

    def __init__(self, model: Any, optimizer: Any, scheduler: Any, train_step: Callable[..., float], seed: int) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._train_step = train_step
        torch.manual_seed(seed)
        self._generator_state = torch.get_rng_state()

    def step(self, batch: Any) -> None:
        torch.set_rng_state(self._generator_state)
        started = time.perf_counter()
        loss = self._train_step(self.model, self.optimizer, self.scheduler, batch)
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(loss)
        self._generator_state = torch.get_rng_state()


def take_turns(first: Side, second: Side, batches: Sequence[Any]) -> Iterator[None]:
    """Both sides step on every batch; who goes first alternates. Yields after each pair."""
    for number, batch in enumerate(batches):
        for side in (first, second) if number % 2 == 0 else (second, first):
            side.step(batch)
        yield


def loss_differences(
    first: Side, second: Side, batches: Sequence[Any], after_each: Callable[[], Any] = lambda: None
) -> list[float]:
    """|loss of one - loss of the other| at each training step: rounding errors, if dropout is off."""
    for _ in take_turns(first, second, batches):
        after_each()
    return [abs(a - b) for a, b in zip(first.losses, second.losses, strict=True)]


def peak_memory() -> int:
    """Bytes: the most physical memory that this process ever held."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the parent's memory at the fork too
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def smooth(values: Sequence[float], memory: float = 0.85) -> list[float]:
    """Exponential moving average that starts unbiased."""
    smoothed, average, weight = [], 0.0, 0.0
    for value in values:
        average, weight = memory * average + (1 - memory) * value, memory * weight + (1 - memory)
        smoothed.append(average / weight)
    return smoothed


def plot(path: Path, panels: Sequence[dict[str, Any]]) -> None:
    """Loss against wall-clock time; a panel has `title`, `subtitle`, `speedup`, `curves`: {name: (seconds, losses)}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "font.size": 11,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GREY,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, len(panels), figsize=(6.2 * len(panels), 4.6), squeeze=False)
        for axis, panel in zip(axes[0], panels, strict=True):
            ends = {}
            for (name, (seconds, losses)), colour in zip(panel["curves"].items(), (STOCK, FASTTUNE), strict=True):
                clock = [sum(seconds[: step + 1]) for step in range(len(seconds))]
                curve = smooth(losses)
                axis.plot(clock, losses, color=colour, alpha=0.22, linewidth=1)
                axis.plot(clock, curve, color=colour, linewidth=2.2)
                axis.plot(clock[-1], curve[-1], "o", color=colour, markersize=6)
                ends[name] = (clock[-1], colour)
            for name, (x, colour) in ends.items():
                axis.axvline(x, ymax=0.97, color=colour, linewidth=0.9, linestyle=(0, (2, 3)))
                axis.annotate(
                    f"{name}\n{x:.0f} s",
                    (x, 0.97),
                    xycoords=("data", "axes fraction"),
                    xytext=(-5, 0),
                    textcoords="offset points",
                    ha="right",
                    va="top",
                    color=colour,
                    fontweight="bold",
                )
            axis.set_xlim(left=0, right=1.03 * max(x for x, _ in ends.values()))
            axis.set_xlabel("training time, seconds")
            axis.set_ylabel("training loss")
            axis.set_title(f"{panel['title']}: {panel['speedup']:.2f}× per step", loc="left", fontweight="bold", pad=24)
            axis.text(0, 1.03, panel["subtitle"], transform=axis.transAxes, color=GREY, fontsize=9.5)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", color=GREY, alpha=0.2, linewidth=0.8)
        figure.tight_layout(w_pad=3)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)
