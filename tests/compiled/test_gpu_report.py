"""scripts/gpu_report.py: a line for each kernel, the bound of an H100, and broken budgets named and failed."""

import aot
import gpu_cases
import gpu_report
import gpu_work
import pytest
import torch


@pytest.fixture
def one_case(monkeypatch):
    (case,) = (c for c in gpu_cases.cases() if str(c) == "bias_gelu erf bfloat16")
    monkeypatch.setattr(gpu_cases, "cases", lambda: [case])
    monkeypatch.setattr("sys.argv", ["gpu_report.py", "--target", "sm90", "--processes", "1"])
    return case


def test_a_line_for_each_kernel(one_case, tmp_path, monkeypatch):
    page = tmp_path / "report.md"
    monkeypatch.setattr("sys.argv", ["gpu_report.py", "--target", "sm90", "--processes", "1", "--out", str(page)])
    assert gpu_report.main() == 0
    text = page.read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| activation", "| column_sums"))]
    assert [row.split("|")[1].strip() for row in rows] == ["activation_forward", "activation_backward", "column_sums"]
    assert all(row.count("|") == 14 for row in rows)
    # Forward: 4096 x 3072 elements, 4 bytes each, at 3.35 TB/s.
    assert f"{4096 * 3072 * 4 / 3.35e12 * 1e6:.1f} µs, memory" in rows[0]
    assert "All are kept." in text


def test_a_broken_budget_fails_and_is_named(one_case, monkeypatch, capsys):
    spilled = aot.Compiled("activation_forward_kernel", "sm90", 4, 255, 12, 0, 2, "", True)
    monkeypatch.setattr(aot, "compile_launches", lambda call, target: [spilled])
    assert gpu_report.main() == 1
    assert "activation_forward_kernel, target sm90, dtype bfloat16: spills is 12" in capsys.readouterr().err


def test_a_tensor_core_bounds_long_attention():
    case = next(c for c in gpu_cases.cases() if str(c) == "attention d128 causal bfloat16")
    work = gpu_work.work("attention_dkdv_kernel", case)
    assert work.matrix_flops == 2 * 4 * gpu_cases.TOKENS / 2
    assert work.bound(torch.bfloat16)[1] in ("matrix", "exponentials", "memory")


def test_every_case_has_work_or_is_a_second_stage():
    names = {
        "attention": "attention_forward_kernel",
        "dropout": "dropout_kernel",
        "bias_gelu": "activation_forward_kernel",
        "bias_activation": "activation_forward_kernel",
        "gated_activation": "activation_backward_kernel",
        "layer_norm": "layer_norm_forward_kernel",
        "dropout_add_layer_norm": "layer_norm_forward_kernel",
        "layer_norm_gelu": "layer_norm_backward_kernel",
        "gelu_layer_norm": "layer_norm_backward_kernel",
        "cross_entropy": "cross_entropy_backward_kernel",
        "linear_cross_entropy": "cross_entropy_forward_kernel",
        "linear_log_prob": "log_prob_backward_kernel",
        "linear_max": "linear_max_forward_kernel",
        "embedding": "embedding_sum_kernel",
        "packing": "gather_rows_kernel",
        "rotary": "rotary_kernel",
    }
    for case in gpu_cases.cases():
        work = gpu_work.work(names[case.operation], case)
        seconds, _ = work.bound(case.dtype)
        assert 1e-7 < seconds < 1e-2, str(case)
