"""Steps that train a part of the model against stock Transformers and the matrix products they need."""

import frozen_workloads
import pytest
from pairs import race


def pytest_generate_tests(metafunc):
    metafunc.parametrize("name", frozen_workloads.workloads(metafunc.config.getoption("--quick")))


def test_frozen_step(name, benchmark, quick, budget):
    if name.endswith("lora"):
        pytest.importorskip("peft")
    race(benchmark, frozen_workloads.workloads(quick)[name](), budget)
