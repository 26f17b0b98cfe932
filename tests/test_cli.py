"""`fasttune doctor` and `fasttune bench`."""

import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fasttune import cli, ops
from fasttune.ops import _backends, _cpp

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture
def doctor(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run():
        result = CliRunner().invoke(cli.app, ["doctor"])
        assert result.exit_code == 0, result.output
        return result.output

    return run


def test_doctor_names_versions_machine_and_every_operation(doctor):
    said = doctor()
    for expected in (torch.__version__, "processor", f"torch uses {torch.get_num_threads()} threads", "GPU"):
        assert expected in said
    for operation in _backends.operations():
        (row,) = [line for line in said.splitlines() if f" {operation} " in line]
        assert ", ".join(ops.available_backends(operation)) in row
    if _cpp.library is not None:
        assert f"{_cpp.library.active_isa()} (this processor can run" in said


def test_doctor_says_what_a_missing_library_costs(doctor, monkeypatch):
    monkeypatch.setattr(_cpp, "library", None)
    monkeypatch.setattr(_cpp, "unavailable_reason", "there was no compiler")
    said = doctor()
    assert "no: there was no compiler" in said
    assert "several times faster" in said


def test_doctor_says_what_is_held_back(doctor, isa, monkeypatch):
    monkeypatch.setenv("FASTTUNE_BACKEND", "torch")
    said = doctor()
    assert "unset FASTTUNE_BACKEND" in said
    assert ("unset FASTTUNE_CPU_ISA" in said) == (isa != _cpp.library.available_isas()[-1])


def test_doctor_misses_transformers(doctor, monkeypatch):
    find_spec = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name == "transformers" else find_spec(name)
    )
    assert "pip install 'transformers>=5.17'" in doctor()


def test_small_bench_compares_with_stock(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    compare = cli._comparisons
    monkeypatch.setattr(cli, "_comparisons", lambda device: compare(device, scale=16))
    result = CliRunner().invoke(cli.app, ["bench", "--small"])
    assert result.exit_code == 0, result.output
    for operation in ("dropout_add_layer_norm", "bias_gelu", "attention"):
        assert operation in result.output


def test_bench_runs_the_checkouts_suite(monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(cli.subprocess, "run", run)
    monkeypatch.setattr(cli.Path, "glob", lambda self, pattern: iter([self / "test_ops.py"]))
    assert CliRunner().invoke(cli.app, ["bench"]).exit_code == 3
    assert commands[0][1:] == ["-m", "pytest", str(CHECKOUT / "benchmarks"), "--benchmark-only"]
