"""Every CUDA kernel once on the host under sanitizers, in any order of threads, and with bugs seeded on purpose.

drive.cpp runs the kernels and prints a hash of what each computes. Kernels are deterministic, so every build and every
order has to print the same; test_cuda_*.py show that these results are right.
"""

import os
import re
import subprocess

import pytest

from cuda_host import building

# tests/cuda_host/cuda_host.h
MISSING_SYNC, UNORDERED_REDUCTION, OFF_BY_ONE, WRONG_FRAGMENT, MISSING_WAIT, MISSING_TILE_SYNC, SAME_HALF = range(1, 8)
MISSING_SCORES_SYNC, SHIFTED_DIAGONAL, LOST_CLAMP, LOST_RUN, OVERWRITTEN_RUN = range(8, 13)
REPORTS = ("ThreadSanitizer", "AddressSanitizer", "runtime error", "cuda_host:")


def drive(build, case="", order=0, bug=0):
    """(lines, what a sanitizer or the harness reported)."""
    environment = {
        **os.environ,
        "TSAN_OPTIONS": "halt_on_error=0 exitcode=66 report_signal_unsafe=0",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [str(building.build(build)), "--case", case, "--order", str(order), "--bug", str(bug)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    reports = [line for line in done.stderr.splitlines() if any(word in line for word in REPORTS)]
    assert reports or done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stderr[-3000:]}"
    return done.stdout.splitlines(), reports


@pytest.fixture(scope="module")
def expected(harness):
    """What the kernels compute, as fibers in ascending order."""
    lines, reports = drive("plain")
    assert not reports
    assert len(lines) == 3 * (2 + 6 + 9 + 1 + 2 + 2 + 2 + 5)
    assert [line for line in lines if not line.endswith("nan=0")] == []
    return lines


def of(expected, case):
    return [line for line in expected if line.startswith(case)]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_results_do_not_depend_on_the_order_of_threads_and_blocks(expected, order):
    assert drive("plain", order=order) == (expected, [])


# The 16-bit types share every line with float32 but for conversions, in all kernels but attention's. Under these
# sanitizers that counts: a minute each.
@pytest.mark.parametrize("case", ["f32", "bf16/attention"])
def test_no_data_race(expected, case):
    assert drive("threads", case=case) == (of(expected, case), [])


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_no_access_out_of_bounds_and_no_undefined_behaviour(expected, dtype):
    assert drive("memory", case=dtype) == (of(expected, dtype), [])


# ------------------------------------------------------------------------------------------------------- seeded bugs


@pytest.mark.parametrize(
    ("bug", "case", "where"),
    [
        (MISSING_SYNC, "f32/layer_norm/520", "reduce.cuh"),
        (UNORDERED_REDUCTION, "f32/layer_norm/520", "reduce.cuh"),
        (MISSING_TILE_SYNC, "bf16/attention/", "load_matrices"),  # the emulated ldmatrix
        (MISSING_SCORES_SYNC, "f32/attention_terms/", "attention_terms.cu"),
    ],
)
def test_a_missing_barrier_is_a_race(bug, case, where):
    _, reports = drive("threads", case=case, bug=bug)
    assert any("data race" in line for line in reports), reports
    assert any(where in line for line in reports), reports


def test_a_write_behind_the_row_is_out_of_bounds():
    _, reports = drive("memory", case="f32/layer_norm/301", bug=OFF_BY_ONE)
    assert any(re.search("heap-buffer-overflow", line) for line in reports), reports


def test_an_unordered_reduction_depends_on_the_order(expected):
    case = "f32/layer_norm/520"
    results = {tuple(drive("plain", case=case, order=order, bug=UNORDERED_REDUCTION)[0]) for order in range(4)}
    assert results != {tuple(of(expected, case))}


@pytest.mark.parametrize(("bug", "sees_nan"), [(MISSING_WAIT, True), (WRONG_FRAGMENT, False)])
def test_wrong_data_is_a_wrong_result(expected, bug, sees_nan):
    case = "f16/attention/"
    lines, _ = drive("plain", case=case, bug=bug)
    assert lines != of(expected, case)
    assert any(not line.endswith("nan=0") for line in lines) == sees_nan
