"""What the figures were measured on."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from fasttune.ops import _cpp


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gflops(size: int = 1536, rounds: int = 5) -> float:
    """What torch's matrix product reaches here, fp32, in GFLOP/s."""
    a, b, out = torch.randn(3, size, size)
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / median(seconds[1:]) / 1e9


def describe() -> dict[str, Any]:
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "fasttune_isa": _cpp.library.active_isa() if _cpp.library is not None else _cpp.unavailable_reason,
        "matmul_gflops": round(gflops(), 1),
    }
