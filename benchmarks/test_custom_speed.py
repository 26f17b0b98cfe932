"""Training steps of modules that people write around an encoder, and of heads that read padding."""

import custom_workloads
from pairs import race


def pytest_generate_tests(metafunc):
    metafunc.parametrize("name", custom_workloads.workloads(metafunc.config.getoption("--quick")))


def test_custom_step(name, benchmark, quick, budget):
    race(benchmark, custom_workloads.workloads(quick)[name](), budget)
