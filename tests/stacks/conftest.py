"""Makes the tiny models of tests/patching importable, and Transformers less chatty about them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "patching"))
transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
