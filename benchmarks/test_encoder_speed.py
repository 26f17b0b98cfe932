"""Training steps of further encoders against stock Transformers and against the products that they need."""

import encoder_workloads
from pairs import race


def pytest_generate_tests(metafunc):
    metafunc.parametrize("name", encoder_workloads.workloads(metafunc.config.getoption("--quick")))


def test_encoder_step(name, benchmark, quick, compiled, budget):
    race(benchmark, encoder_workloads.workloads(quick)[name](compiled=compiled), budget)
