"""Times one side against its peers, taking turns in one process.

A machine's speed drifts by tens of percent within minutes, so two numbers taken one after the other say little. Here
every round runs each peer once, the needed matrix products once, and fasttune once; a ratio is the median of the ratios
of the rounds, and its spread their quartiles. pytest-benchmark times fasttune's turns, so its table holds the same
measurements.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from products import ProductTimer
from pytest_benchmark.fixture import BenchmarkFixture
from workload import COMPILED, OURS, Step, Workload

MAX_ROUNDS = 60


@dataclass(frozen=True)
class Budget:
    """How long a race may take; at least `min_rounds` rounds are run whatever they take."""

    seconds: float = 20.0
    min_rounds: int = 5
    warm_up_seconds: float = 0.2  # for each side, before the first round


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    return ordered[len(ordered) // 4], median(ordered), ordered[(3 * len(ordered)) // 4]


def timed(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def warm_up(step: Step, seconds: float) -> float:
    """Runs the step for that long, once at least; seconds of the last call."""
    spent = last = timed(step)
    while spent < seconds:
        last = timed(step)
        spent += last
    return last


def race(benchmark: BenchmarkFixture, workload: Workload, budget: Budget) -> dict[str, Any]:
    """Runs the workload's sides in turns and records the outcome in benchmark.extra_info."""
    sides = {name: build() for name, build in workload.sides.items()}
    ours = sides.pop(OURS)
    if COMPILED in sides:
        sides[COMPILED]()  # compiles
    if workload.products is not None:
        timer = ProductTimer(workload.products())
    round_seconds = sum(warm_up(step, budget.warm_up_seconds) for step in (*sides.values(), ours))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    product_seconds: list[float] = []
    if workload.products is not None:
        timer()
        round_seconds += timed(timer)
    rounds = max(budget.min_rounds, min(MAX_ROUNDS, int(budget.seconds / round_seconds)))

    def peers_turn() -> None:
        for name, step in sides.items():
            seconds[name].append(timed(step))
        if workload.products is not None:
            product_seconds.append(timer())

    gc.collect()
    benchmark.group = workload.group
    benchmark.pedantic(ours, setup=peers_turn, rounds=rounds)
    info = describe(workload) | {"rounds": rounds}
    if benchmark.stats is not None:  # not under --benchmark-disable
        info |= outcome(workload, list(benchmark.stats.stats.data), seconds, product_seconds)
    benchmark.extra_info.update(info)
    return info


def describe(workload: Workload) -> dict[str, Any]:
    return {
        "group": workload.group,
        "shape": workload.shape,
        "dtype": workload.dtype,
        "threads": torch.get_num_threads(),
        **workload.notes,
    }


def outcome(
    workload: Workload, ours: list[float], peers: dict[str, list[float]], products: list[float]
) -> dict[str, Any]:
    """The figures of a race from the seconds of each round."""
    info: dict[str, Any] = {"ours_ms": 1e3 * median(ours), "peers": {}}
    for name, theirs in peers.items():
        low, middle, high = quartiles([b / a for a, b in zip(ours, theirs, strict=True)])
        info["peers"][name] = {"ms": 1e3 * median(theirs), "ratio": middle, "ratio_low": low, "ratio_high": high}
    if peers:
        best = min(info["peers"], key=lambda name: info["peers"][name]["ms"])
        info |= {"best_peer": best, "speedup": info["peers"][best]["ratio"]}
    if products:
        info |= {
            "products_ms": 1e3 * median(products),
            "over_products": median(a / b for a, b in zip(ours, products, strict=True)),
        }
        for name, theirs in peers.items():
            info["peers"][name]["over_products"] = median(a / b for a, b in zip(theirs, products, strict=True))
    if workload.useful_bytes:
        info |= {"useful_bytes": workload.useful_bytes, "gb_per_s": workload.useful_bytes / median(ours) / 1e9}
    return info


Race = Callable[[Workload], dict[str, Any]]
