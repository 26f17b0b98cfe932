"""Extra memory of one side of a workload, measured in a process of its own.

    python benchmarks/memory.py attention-8x512x12x64-float32-dropout0.1 fasttune

prints how many bytes a step held at its peak beyond what was there before it (inputs) and what it hands back (output
and gradients), and

    python benchmarks/memory.py padding_workloads bert-base-classification fasttune

how many bytes a training step of that module's rows held beyond what a first step left. Large blocks go back to the
system when freed (glibc's thresholds are pinned), and a tiny step of the same kind, or a first one, runs before, for
code and thread pools to be loaded. Linux only: it reads and resets the process's own peak.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workload import Workload

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def _status_bytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def measure(workload: Workload, side: str) -> int:
    """Extra bytes of one step of this side, in this process."""
    step = workload.sides[side]()
    CLEAR.write_text("5")  # the peak starts anew here
    before = _status_bytes("VmRSS")
    step()
    return _status_bytes("VmHWM") - before - workload.kept_bytes


def measure_by_name(name: str, side: str) -> int:
    import op_workloads
    import torch

    torch.set_num_threads(2)
    tiny = op_workloads.workloads(quick=True)
    same_kind = name if name in tiny else next(other for other in tiny if other.split("-")[0] == name.split("-")[0])
    tiny[same_kind]().sides[side]()()
    return measure(op_workloads.workloads(quick=False)[name](), side)


def measure_step(module: str, name: str, side: str) -> int:
    """The peak of a training step of one side beyond what was there before it, after a first step."""
    import torch

    torch.set_num_threads(2)
    row = importlib.import_module(module).workloads(quick=False)[name]()
    step = row.sides[side]()
    step()  # the optimizer's state and the gradients' memory are there after it
    return measure(replace(row, sides={side: lambda: step}), side)


def extra_bytes(name: str, side: str) -> int | None:
    """`measure_by_name` in a fresh process; None where the system does not keep the figures."""
    return _alone(name, side)


def step_bytes(module: str, name: str, side: str) -> int | None:
    """`measure_step` in a fresh process; None where the system does not keep the figures."""
    return _alone(module, name, side)


def _alone(*arguments: str) -> int | None:
    if not (CLEAR.exists() and os.access(CLEAR, os.W_OK)):
        return None
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env={**os.environ, **SETTINGS}, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    print((measure_step if len(sys.argv) == 4 else measure_by_name)(*sys.argv[1:]))
