"""Which share of a MiniLM-6 step, 16 x 128, goes into proving that its shortcuts may be taken, and into promising rows.

    python benchmarks/premises.py

prints, for a padded and for a full batch, the milliseconds spent in looking at masks, calls and modules (premises) and
in all of the Python that hands out promises, kernels aside; medians of ten steps.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from statistics import median
from typing import Any

import padding_workloads
import torch
from workload import OURS

from fasttune.patching.families import _bert_like
from fasttune.patching.layers import entry, layer_rows
from fasttune.patching.promises import source

PREMISES = ((entry, "layout_of_call"), (entry, "_check"), (_bert_like, "PostNorm"))
spent: defaultdict[str, float] = defaultdict(float)


def clock(owner: Any, name: str, kind: str) -> None:
    """Adds up the time in owner.name, counted once where it calls itself."""
    inner: Callable[..., Any] = getattr(owner, name)
    running = [0]

    @wraps(inner)
    def timed(*args: Any, **kwargs: Any) -> Any:
        running[0] += 1
        started = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            running[0] -= 1
            spent[kind] += (time.perf_counter() - started) * (not running[0])

    setattr(owner, name, timed)


def main() -> None:
    torch.set_num_threads(2)
    for owner, name in PREMISES:
        clock(owner, name, "premises")
    clock(_bert_like, "promise", "promises")
    clock(layer_rows.LayerRows, "real", "kernels")  # the layer below is computed when the next one is called
    clock(source.TensorRows, "real", "kernels")
    for name in ("minilm-6-classification", "minilm-6-fill-100"):
        step = padding_workloads.workloads(quick=False)[name]().sides[OURS]()
        for _ in range(3):
            step()
        rounds = []
        for _ in range(10):
            spent.clear()
            started = time.perf_counter()
            step()
            whole = time.perf_counter() - started
            rounds.append((spent["premises"], spent["promises"] - spent["kernels"], whole))
        premises, promises, whole = (1e3 * median(column) for column in zip(*rounds, strict=True))
        print(
            f"{name}: premises {premises:.1f} ms ({premises / whole:.2%}), with promises {promises:.1f} ms"
            f" ({promises / whole:.2%}) of {whole:.0f} ms"
        )


if __name__ == "__main__":
    main()
