"""Puts the kernels' host build in the place of the CUDA library: backend="cuda" then runs on CPU tensors."""

import pytest
import torch

from cuda_host import building
from fasttune.ops import _backends, _cuda


@pytest.fixture(scope="session")
def harness():
    reason = building.missing()
    if reason is not None:
        pytest.skip(reason)
    return building.module()


@pytest.fixture(autouse=True)
def cuda_backend(harness, monkeypatch):
    monkeypatch.setattr(_cuda, "library", harness)
    monkeypatch.setattr(_cuda, "emulated", True)
    monkeypatch.setattr(_backends, "_chosen", {})
    torch.manual_seed(0)
    harness.set_order(0)
    yield harness
    harness.seed_bug(0)
    harness.set_order(0)
