"""Compiles every Triton kernel and writes what the compilers made of it as Markdown (make gpu-report).

    python scripts/gpu_report.py --out docs/gpu-report.md [--target sm90 ...]

Ends with status 1, and the sentences on stderr, if a kernel breaks its budget (benchmarks/gpu_budgets.toml).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aot
import gpu_budgets
import gpu_cases
import triton
from gpu_work import work

INTRODUCTION = """# What the compilers make of the Triton kernels

Written by `make gpu-report` with Triton {version}; every kernel is compiled ahead of time as the library launches it
(`scripts/gpu_cases.py`: 8 sequences of 512 tokens, 768 wide, 50257 classes). **No kernel has run on hardware yet**: the
registers, spills, shared memory and occupancy are the compilers' own figures, the rest is arithmetic.

- *spills*: bytes (NVIDIA) or registers (AMD) that went to memory. *blocks*: resident on a multiprocessor at a time;
  *occupancy*: their share of the warps or waves that it can hold.
- *bytes* and *operations* per element of the result, operations without those of matrix products; *bound*: the least
  time an H100 SXM needs for the launch, and which limit sets it (`scripts/gpu_work.py`). Second stages have none.
- Budgets: `benchmarks/gpu_budgets.toml`. {verdict}
"""


@dataclasses.dataclass(frozen=True)
class Row:
    case: int
    compiled: aot.Compiled


def compile_case(number: int, target: str) -> list[Row]:
    return [Row(number, kernel) for kernel in aot.compile_launches(gpu_cases.cases()[number].call, target)]


def compile_all(targets: list[str], processes: int) -> list[Row]:
    jobs = [(number, target) for target in targets for number in range(len(gpu_cases.cases()))]
    if processes == 1:
        return [row for job in jobs for row in compile_case(*job)]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        return [row for rows in pool.map(compile_case, *zip(*jobs, strict=True)) for row in rows]


def broken_budgets(rows: list[Row]) -> list[str]:
    rules, cases = gpu_budgets.load("triton"), gpu_cases.cases()
    messages = []
    for row in rows:
        case = cases[row.case]
        facts = {"kernel": row.compiled.kernel, "target": row.compiled.target, "dtype": case.dtype_name, **case.facts}
        messages += gpu_budgets.violations(rules, facts, dataclasses.asdict(row.compiled))
    return messages


def _occupancy(kernel: aot.Compiled) -> float:
    warps = aot.NVIDIA_LIMITS[kernel.target][3] if kernel.target.startswith("sm") else 4 * aot.AMD_WAVES
    return kernel.blocks * kernel.warps / warps


def _lines(rows: list[Row], target: str) -> Iterator[str]:
    cases = gpu_cases.cases()
    yield f"\n## {target}\n"
    yield (
        "| kernel | in | dtype | warps | registers | spills | shared | blocks | occupancy | MMA | bytes | operations"
        " | bound on H100 |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    seen = set()
    for row in rows:
        kernel, case = row.compiled, cases[row.case]
        key = (kernel, str(case))
        if kernel.target != target or key in seen:
            continue
        seen.add(key)
        load = work(kernel.kernel, case)
        figures = "| | | |"
        if load is not None:
            seconds, what = load.bound(case.dtype)
            bound = f"{seconds * 1e6:.1f} µs, {what}" if target == "sm90" else ""
            figures = f"| {load.bytes:.1f} | {load.operations:.0f} | {bound} |"
        name = kernel.kernel.removesuffix("_kernel")
        yield (
            f"| {name} | {case.operation} {case.variant} | {case.dtype_name} | {kernel.warps} | {kernel.registers}"
            f" | {kernel.spills} | {kernel.shared} | {kernel.blocks} | {_occupancy(kernel):.0%} | {kernel.mma or '–'} "
            + figures
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file; without it only the budgets are checked")
    parser.add_argument("--target", nargs="*", choices=gpu_cases.TARGETS, default=gpu_cases.TARGETS)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    rows = compile_all(list(arguments.target), arguments.processes)
    broken = broken_budgets(rows)
    verdict = (
        "All are kept." if not broken else f"{len(broken)} are broken:\n\n" + "\n".join(f"  - {m}" for m in broken)
    )
    if arguments.out is not None:
        text = [INTRODUCTION.format(version=triton.__version__, verdict=verdict)]
        for target in arguments.target:
            text += _lines(rows, target)
        arguments.out.write_text("\n".join(text).replace("  |", " |") + "\n")
    print("\n".join(broken), file=sys.stderr, end="\n" if broken else "")
    print(f"{len(rows)} kernels compiled with Triton {triton.__version__}, {len(broken)} budgets broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
