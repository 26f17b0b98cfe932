"""Block sizes of the kernels, read from their sources, so that tests which go past them follow when they change."""

import importlib
import re
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc" / "cpu"


def cpp(source: str, name: str) -> int:
    """A whole-number constant of csrc/cpu/<source>, such as `constexpr int64_t kBlock = 1024;`."""
    found = re.findall(rf"\b{name} = (\d+)[,;]", (CSRC / source).read_text())
    assert len(found) == 1, f"{source} sets {name} {len(found)} times; expected one number"
    return int(found[0])


def triton(module: str, name: str) -> int:
    """A constant of kernels/<module>.py."""
    return int(getattr(importlib.import_module(f"fasttune.kernels.{module}"), name))
