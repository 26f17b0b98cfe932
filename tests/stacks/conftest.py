"""Makes the tiny models of tests/patching importable, and Transformers less chatty about them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "patching"))
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def always(quiet):
    """In every test of this folder."""
