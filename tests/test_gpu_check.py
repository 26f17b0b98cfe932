"""scripts/gpu_check.sh rehearsed on a CPU: its stages, its parity cases, its report, and that it can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]

import gpu  # noqa: E402
import gpu_parity  # noqa: E402
import gpu_summary  # noqa: E402

from fasttune import ops  # noqa: E402

BACKEND = next((b for b in ("cpp", "triton") if b in ops.available_backends("attention")), None)


@pytest.mark.skipif(BACKEND is None, reason="no compiled library")
@pytest.mark.slow
def test_rehearsal_on_a_cpu(tmp_path):
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "DEVICE": "cpu",
        "BUILD": "0",
        "PARITY_ARGS": f"--backend {BACKEND} --only float32",
    }
    run = subprocess.run(
        ["bash", "scripts/gpu_check.sh", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {stage["name"]: stage["outcome"].split(":")[0] for stage in summary["stages"]} == {
        "machine": "passed",
        "build": "skipped",
        "parity": "passed",
        "sanitizer": "skipped",
        "benchmarks": "passed",
    }
    assert summary["parity"]["passed"] == summary["parity"]["cases"] >= 15
    assert {row["operation"] for row in summary["benchmarks"]["rows"]} >= {"attention", "linear_cross_entropy"}
    assert "| attention |" in (tmp_path / "summary.md").read_text()


@pytest.mark.skipif(BACKEND is None, reason="no compiled library")
def test_a_wrong_kernel_fails_parity(tmp_path, monkeypatch):
    right = ops.bias_gelu
    monkeypatch.setattr(ops, "bias_gelu", lambda *args, **options: right(*args, **options) * 1.01)
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--backend", BACKEND, "--only", "bias_gelu none float32"]
    assert gpu_parity.main(arguments) == 1
    (result,) = json.loads((tmp_path / "parity.json").read_text())
    assert result["outcome"] == "failed"
    assert "output: error" in result["message"]


def test_nothing_run_is_a_failure(tmp_path):
    assert gpu_parity.main(["--out", str(tmp_path), "--device", "cpu", "--only", "no such case"]) == 1


def test_cases_after_the_deadline_are_not_passed():
    (result,) = gpu_parity.run(iter([("late", lambda: None)]), seconds=-1.0)
    assert result["outcome"] == "not run"


def test_a_failed_stage_fails_the_check(tmp_path):
    (tmp_path / "stages.tsv").write_text("build\tpassed\t3\nparity\tfailed (124)\t200\n")
    assert gpu_summary.main(tmp_path) == 1
    assert "| parity | failed (124) | 200 |" in (tmp_path / "summary.md").read_text()


def test_the_two_gpu_backends_race(monkeypatch):
    monkeypatch.setattr(gpu._backends, "why_not", lambda operation, backend, *where: None)
    assert list(gpu._ours("bias_gelu", "cuda", torch.bfloat16)) == ["fasttune", "fasttune triton", "fasttune cuda"]
    times = {"fasttune": 2.0, "fasttune triton": 2.0, "fasttune cuda": 1.0, "eager": 4.0}
    row = {"operation": "bias_gelu", "shape": "8 x 8", "ms": times, "notes": []}
    assert gpu.ratio(row) == 2.0
    page = gpu.markdown([row], {})
    assert "| bias_gelu | 8 x 8 | 2.00 | 2.000 | eager 4.000 |" in page
    assert "| bias_gelu | 8 x 8 | 2.000 | 1.000 | 2.00 |" in page
    assert "For CUDA_BEATS_TRITON (fasttune/ops/_backends.py): bias_gelu." in page
    slower = {**row, "ms": {**times, "fasttune cuda": 3.0}}
    assert "_backends.py): none." in gpu.markdown([row, slower], {})


def test_every_operation_with_gpu_kernels_has_a_parity_case():
    from fasttune.ops import _backends

    for operation in _backends.operations():
        if not {"triton", "cuda"} & set(_backends._implemented[operation]):
            continue
        cases = list(gpu_parity._pair(operation, "torch", "cpu", torch.float32, big=False))
        assert cases, f"{operation} has no case in scripts/gpu_parity.py"


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_models_are_patched_with_what_a_backend_has(backend):
    pytest.importorskip("transformers")
    from fasttune.ops import _backends
    from fasttune.patching.families import family_named
    from fasttune.patching.options import Options

    options = Options(backend=backend, **gpu_parity.LEFT_OUT.get(backend, {}))
    for name in ("gpt2", "bert"):
        for rule in family_named(name).replacements:
            if rule.operation and options.wants(rule.group):
                assert backend in _backends._implemented[rule.operation], rule.operation


def test_what_there_is_no_time_for_fails(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", "DEADLINE": "0"}
    run = subprocess.run(["bash", "scripts/gpu_check.sh", str(tmp_path)], cwd=ROOT, env=environment)
    assert run.returncode == 1
    stages = {
        stage["name"]: stage["outcome"] for stage in json.loads((tmp_path / "summary.json").read_text())["stages"]
    }
    assert stages["parity"] == stages["benchmarks"] == "failed (no time left)"
