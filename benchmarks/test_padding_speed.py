"""Training steps on padded batches against stock Transformers, and full ones against packing switched off."""

import padding_workloads
from pairs import race


def pytest_generate_tests(metafunc):
    metafunc.parametrize("name", padding_workloads.workloads(metafunc.config.getoption("--quick")))


def test_padded_step(name, benchmark, quick, compiled, budget):
    race(benchmark, padding_workloads.workloads(quick)[name](compiled=compiled), budget)
