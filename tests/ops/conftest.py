"""Under TRITON_INTERPRET=1 these tests run the Triton kernels; see tests/fused.py."""

import pytest
from fused import INTERPRETED

# numpy warns where the interpreter makes a NaN or an infinity that is meant.
MEANT = "ignore:(invalid value|divide by zero|overflow):RuntimeWarning"


@pytest.fixture(autouse=True)
def fused_by_default(monkeypatch):
    """Calls that leave the backend open run on the one that is tested."""
    if INTERPRETED:
        monkeypatch.setenv("FASTTUNE_BACKEND", "triton")


def pytest_collection_modifyitems(items):
    if INTERPRETED:
        for item in items:
            item.add_marker(pytest.mark.filterwarnings(MEANT))
