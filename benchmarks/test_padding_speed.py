"""Training steps on padded batches against stock Transformers, and full ones against packing switched off."""

import memory
import padding_workloads
from pairs import race
from workload import COMPILED


def pytest_generate_tests(metafunc):
    metafunc.parametrize("name", padding_workloads.workloads(metafunc.config.getoption("--quick")))


def test_padded_step(name, benchmark, quick, compiled, budget, with_memory):
    workload = padding_workloads.workloads(quick)[name](compiled=compiled)
    race(benchmark, workload, budget)
    if with_memory and "fill" not in name:  # one figure for each kind of step is enough
        sides = [side for side in workload.sides if side != COMPILED]
        benchmark.extra_info["peak_memory"] = {
            side: memory.step_bytes("padding_workloads", name, side) for side in sides
        }
