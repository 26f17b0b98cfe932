"""Compiles each Triton kernel once, for one NVIDIA and one AMD target, with whichever Triton comes first on the path.

`make triton36` runs it with the oldest supported one: the kernels use nothing newer. Budgets are not held against it;
that every kernel compiles, and without global scratch memory, is.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aot
import gpu_cases
import triton

# In bfloat16; the targets are those whose compilers differ most. Attention at head dimension 64 with and without
# dropout and terms, every other operation in its first variant.
ATTENTION = ("causal", "causal dropout", "causal packed", "causal chosen", "bias dropout", "disentangled dropout")
SAMPLE = {"attention": tuple(f"d64 {variant}" for variant in ATTENTION)}
TARGETS = {"attention": ("sm90",)}


def chosen(case: gpu_cases.Case) -> bool:
    variants = SAMPLE.get(case.operation, ("", "erf"))
    return case.dtype_name == "bfloat16" and case.variant in variants


def main() -> int:
    kernels: set[str] = set()
    for case in filter(chosen, gpu_cases.cases()):
        for target in TARGETS.get(case.operation, ("sm90", "gfx942")):
            kernels |= {compiled.kernel for compiled in aot.compile_launches(case.call, target)}
    print(f"Triton {triton.__version__} compiles {len(kernels)} kernels: {', '.join(sorted(kernels))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
