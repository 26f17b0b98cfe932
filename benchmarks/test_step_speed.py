"""Whole training steps against stock Transformers and against the matrix products that they need."""

import step_workloads
from pairs import race


def pytest_generate_tests(metafunc):
    metafunc.parametrize("name", step_workloads.workloads(metafunc.config.getoption("--quick")))


def test_step(name, benchmark, quick, compiled, budget):
    race(benchmark, step_workloads.workloads(quick)[name](compiled=compiled), budget)
