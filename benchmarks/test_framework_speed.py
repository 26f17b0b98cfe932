"""Training steps and inference inside of sentence-transformers, TRL, Trainer's label smoothing, encoder-decoders."""

import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("trl")

import framework_workloads
import memory
from pairs import race


def pytest_generate_tests(metafunc):
    metafunc.parametrize("name", framework_workloads.workloads(metafunc.config.getoption("--quick")))


@pytest.mark.filterwarnings("ignore:Version v4.12.0")
def test_framework(name, benchmark, quick, budget, with_memory):
    workload = framework_workloads.workloads(quick)[name]()
    race(benchmark, workload, budget)
    if with_memory:
        peaks = {side: memory.step_bytes("framework_workloads", name, side) for side in workload.sides}
        benchmark.extra_info["peak_memory"] = peaks
