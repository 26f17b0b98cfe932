"""Every operation against what a stock model runs in its place."""

import memory
import op_workloads
from pairs import race
from workload import COMPILED


def pytest_generate_tests(metafunc):
    metafunc.parametrize("name", op_workloads.workloads(metafunc.config.getoption("--quick")))


def test_op(name, benchmark, quick, compiled, budget, with_memory):
    workload = op_workloads.workloads(quick)[name](compiled=compiled)
    race(benchmark, workload, budget)
    if workload.memory and with_memory:
        sides = [side for side in workload.sides if side != COMPILED]
        benchmark.extra_info["extra_memory"] = {side: memory.extra_bytes(name, side) for side in sides}
