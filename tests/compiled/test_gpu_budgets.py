"""Every Triton kernel, compiled as the library launches it, stays inside benchmarks/gpu_budgets.toml."""

import dataclasses

import aot
import gpu_budgets
import gpu_cases
import pytest

RULES = gpu_budgets.load("triton")
GATE = [(case, target) for case in gpu_cases.cases() for target in case.targets]


@pytest.mark.parametrize(("case", "target"), GATE, ids=lambda value: str(value).replace(" ", "-"))
def test_kernels_stay_inside_their_budget(case, target):
    compiled = aot.compile_launches(case.call, target)
    assert compiled
    broken = []
    for kernel in compiled:
        facts = {"kernel": kernel.kernel, "target": target, "dtype": case.dtype_name, **case.facts}
        broken += gpu_budgets.violations(RULES, facts, dataclasses.asdict(kernel))
    assert not broken, "\n".join(broken)
