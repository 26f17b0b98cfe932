"""Options of `pytest benchmarks/ --benchmark-only`; see pairs.py for how a row is measured."""

from __future__ import annotations

import machine
import pytest
import torch
from pairs import Budget


def pytest_addoption(parser):
    group = parser.getgroup("fasttune benchmarks")
    group.addoption("--quick", action="store_true", help="tiny shapes: tries the harness, the figures mean nothing")
    group.addoption("--compile", action="store_true", help="add torch.compile of the stock side as a peer (minutes)")
    group.addoption("--no-memory", action="store_true", help="skip extra memory: a process for each side, seconds each")
    group.addoption("--threads", type=int, default=2, help="torch.set_num_threads")
    group.addoption("--seconds", type=float, default=20.0, help="time for each row")
    group.addoption("--min-rounds", type=int, default=5, help="rounds for each row, whatever they take")


def pytest_configure(config):
    torch.set_num_threads(config.getoption("--threads"))


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["fasttune"] = machine.describe() | {"quick": config.getoption("--quick")}


@pytest.fixture
def quick(request) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def compiled(request) -> bool:
    return request.config.getoption("--compile")


@pytest.fixture
def with_memory(request, quick) -> bool:
    return not (quick or request.config.getoption("--no-memory"))


@pytest.fixture
def budget(request, quick) -> Budget:
    if quick:
        return Budget(seconds=0.0, min_rounds=2, warm_up_seconds=0.0)
    return Budget(request.config.getoption("--seconds"), request.config.getoption("--min-rounds"))
