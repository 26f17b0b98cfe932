"""These tests run the Triton kernels in its interpreter, so they need a process of their own:

    TRITON_INTERPRET=1 pytest tests/kernels tests/ops

`make triton` does that; without the variable nothing here is collected. What a kernel computes is
tested in tests/ops, as that of every backend; here are bytes, tiles, bad indices as on a GPU, and whole models.
"""

import os

import pytest

collect_ignore_glob = []

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]

FIGURE = "bytes moved"


@pytest.fixture
def moves_at_most(record_property):
    """Holds the bytes that kernels moved against the least possible; the figures are printed after the run."""

    def check(what, moved, least, times=1.05):
        ratio = moved.total() / least
        record_property(FIGURE, f"{what}: {ratio:.3f} x the least possible")
        assert ratio <= times, f"{what} moves {ratio:.3f} times the least possible; at most {times} is allowed"

    return check


def pytest_terminal_summary(terminalreporter):
    reports = [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]
    figures = [value for report in reports for name, value in report.user_properties if name == FIGURE]
    if figures:
        terminalreporter.section("bytes that the Triton kernels load and store")
        for figure in sorted(figures):
            terminalreporter.write_line(figure)
