"""Shared fixtures. Run `pytest` from the checkout; every backend and instruction set this machine has is exercised."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from fasttune.ops import _cpp

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import interpreter

    interpreter.install()

torch.set_num_threads(2)
# A loaded machine is no reason to fail, and CI draws the same examples every time.
settings.register_profile(
    "fasttune",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("fasttune")


def _isas():
    if INTERPRETED:
        return ["triton"]
    return _cpp.library.available_isas() if _cpp.library is not None else []


@pytest.fixture(params=_isas() or [pytest.param("none", marks=pytest.mark.skip(reason=_cpp.unavailable_reason))])
def isa(request):
    """Runs a test once per instruction set of this machine, and proves that the forced one is active; once where the
    Triton kernels are what is tested (tests/fused.py)."""
    if INTERPRETED:
        yield request.param
        return
    before = _cpp.library.active_isa()
    _cpp.library.select_isa(request.param)
    assert _cpp.library.active_isa() == request.param
    yield request.param
    _cpp.library.select_isa(before)


@pytest.fixture
def quiet():
    """Transformers is chatty about tiny models."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture
def one_thread():
    """Models this small gain nothing from a second thread, and lose much on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def same_numbers():
    """What a test draws does not depend on the tests before it in the same process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is filled with NaN, so that an output element nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill
