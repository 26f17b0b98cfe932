"""`fasttune doctor`, `fasttune bench` and `fasttune verify`."""

import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fasttune import cli, ops, verification
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


# ------------------------------------------------------------------------------------------------------------- verify


@pytest.fixture
def saved(tmp_path):
    """(folder of a tiny classifier, a batch for it)."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    ids = torch.randint(0, 50, (3, 9))
    return tmp_path / "model", {"input_ids": ids, "labels": torch.tensor([0, 1, 1])}


def verify(*arguments):
    command = ["verify", *map(str, arguments), "--device", "cpu", "--repeats", "1"]
    result = CliRunner().invoke(cli.app, command, env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.replace("│", "").split())  # errors come in a box


def test_verify_compares_one_batch(saved, tmp_path):
    folder, batch = saved
    torch.save(batch, tmp_path / "batch.pt")
    code, said = verify(folder, tmp_path / "batch.pt", "--packing", "false", "--dropout", "8")
    assert code == 0, said
    for expected in ("BertForSequenceClassification: the numbers agree", "mean loss of 8 steps", "ms patched"):
        assert expected in said


def test_verify_compares_every_batch_and_exits_with_one(saved, tmp_path, monkeypatch):
    folder, batch = saved
    torch.save([batch, batch], tmp_path / "batches.pt")
    code, said = verify(folder, tmp_path / "batches.pt", "--dtype", "bfloat16")
    assert code == 0, said
    assert "batch 2 of 2" in said
    assert "All batches agree." in said
    monkeypatch.setitem(verification.FACTOR, "float64", -1.0)  # no error is small enough
    monkeypatch.setattr(verification, "DRAWS", 1)
    code, said = verify(folder, tmp_path / "batches.pt")
    assert code == 1
    assert "values beyond their bound" in said
    assert "2 of 2 batches are beyond their bounds." in said


def test_verify_reads_safetensors_and_takes_a_class(saved, tmp_path):
    from safetensors.torch import save_file

    folder, batch = saved
    save_file({"input_ids": batch["input_ids"]}, tmp_path / "batch.safetensors")
    code, said = verify(folder, tmp_path / "batch.safetensors", "--class", "AutoModel", "--backend", "torch")
    assert code == 0, said
    assert "fasttune.verify on BertModel: the numbers agree" in said


def test_verify_says_what_is_wrong(saved, tmp_path):
    folder, batch = saved
    torch.save(batch, tmp_path / "batch.pt")
    torch.save([1, 2], tmp_path / "numbers.pt")
    torch.save([], tmp_path / "nothing.pt")
    torch.save({"input_ids": batch["input_ids"].numpy().dtype}, tmp_path / "code.pt")
    for arguments, expected in [
        ([folder, tmp_path / "none.pt"], "expected a file, and there is none"),
        ([folder, tmp_path / "numbers.pt"], "a list of int; expected a dict of tensors or a list of dicts"),
        ([folder, tmp_path / "nothing.pt"], "an empty list; expected a dict"),
        ([folder, tmp_path / "code.pt"], "Expected what torch.save(dict(batch), path)"),
        ([tmp_path, tmp_path / "batch.pt"], "which Transformers does not load"),
        (
            [folder, tmp_path / "batch.pt", "--class", "AutoModelForCats"],
            "'AutoModelForCats', which Transformers lacks",
        ),
        ([folder, tmp_path / "batch.pt", "--packing", "maybe"], "--packing is 'maybe'; expected true, false or auto"),
        ([folder, tmp_path / "batch.pt", "--dtype", "int8"], "--dtype is 'int8'; expected float32"),
        ([folder, tmp_path / "batch.pt", "--backend", "fast"], "backend is 'fast'; expected one of"),
        ([folder, tmp_path / "batch.pt", "--dropout", "2"], "expected False, True or at least 8 steps"),
    ]:
        code, said = verify(*arguments)
        assert code == 2, said
        assert expected in said


def test_verify_misses_transformers(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "batch.pt")
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    code, said = verify("model", tmp_path / "batch.pt")
    assert code == 2
    assert "pip install 'transformers>=5.17'" in said
