"""Puts the kernels' host build in the place of the CUDA library: backend="cuda" then runs on CPU tensors.

On a machine with a GPU, FASTTUNE_TEST_DEVICE=cuda runs the same tests on the library itself, but for those that seed
bugs or use sanitizers.
"""

import pytest
import torch

from cuda_host import building
from fasttune.ops import _backends, _cuda


@pytest.fixture(scope="session")
def harness():
    reason = building.missing()
    if reason is not None:
        pytest.skip(f"the CUDA kernels cannot be run on the host: {reason}")
    if building.ON_GPU:
        pytest.skip("FASTTUNE_TEST_DEVICE is cuda: this test is for the host")
    return building.module()


@pytest.fixture(autouse=True)
def cuda_backend(request):
    torch.manual_seed(0)
    if building.ON_GPU:
        with torch.device("cuda"):
            yield
    else:
        yield from _on_the_host(request.getfixturevalue("harness"), request.getfixturevalue("monkeypatch"))


def _on_the_host(harness, monkeypatch):
    monkeypatch.setattr(_cuda, "library", harness)
    monkeypatch.setattr(_cuda, "emulated", True)
    monkeypatch.setattr(_backends, "_chosen", {})
    yield
    harness.seed_bug(0)
