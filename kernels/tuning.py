"""Choosing tiles by timing, for who asks: FASTTUNE_AUTOTUNE=1. Without it the tables decide and nothing is ever timed.

The first launch of a kind (operation, head dimension, dtype, ...; never batch or sequence) times every candidate on the
tensors at hand and keeps the fastest, in this process and in a file for each device and version of Triton and fasttune:

    $FASTTUNE_CACHE_DIR, else $XDG_CACHE_HOME/fasttune, else ~/.cache/fasttune

Inside a CUDA graph's capture nothing can be timed: the table's tile is taken then.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources

T = TypeVar("T")

_winners: dict[str, dict[str, str]] = {}  # file -> kind -> repr of the winner


def enabled() -> bool:
    return os.environ.get("FASTTUNE_AUTOTUNE") == "1"


def cache_file(device: str) -> Path:
    """Where the winners on a device of that name are kept."""
    import fasttune

    base = os.environ.get("FASTTUNE_CACHE_DIR")
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "fasttune")
    name = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower()
    return Path(base) / f"tiles-{name}-triton{triton.__version__}-fasttune{fasttune.__version__}.json"


def _milliseconds(launch: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(launch, warmup=5, rep=20, return_mode="median"))


def _read(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):  # none yet, or cut off: both mean timing again
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: Path, winners: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(winners, indent=1, sort_keys=True) + "\n")
    os.replace(scratch, file)  # processes that tune at once each leave a whole file


def choose(kind: str, default: T, candidates: Sequence[T], launch: Callable[[T], object], device: torch.device) -> T:
    """The tile to launch with: `default`, or with FASTTUNE_AUTOTUNE=1 the candidate whose launch is fastest.

    kind: names what the winner holds for. launch: runs the kernel with a tile; any number of runs leave one result.
    A candidate that does not fit the device is passed over.
    """
    if not enabled() or torch.cuda.is_current_stream_capturing():
        return default
    file = cache_file(torch.cuda.get_device_name(device))
    known = _winners.setdefault(str(file), _read(file))
    if kind not in known:
        times = {}
        for candidate in dict.fromkeys((default, *candidates)):
            try:
                times[candidate] = _milliseconds(lambda tile=candidate: launch(tile))
            except OutOfResources:
                continue
        known[kind] = repr(min(times, key=lambda tile: times[tile]) if times else default)
        _write(file, {**_read(file), **known})
    return next((tile for tile in (default, *candidates) if repr(tile) == known[kind]), default)
