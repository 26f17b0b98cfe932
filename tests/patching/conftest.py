"""Nothing here runs without Transformers."""

import pytest

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def always(quiet):
    """In every test of this folder."""
