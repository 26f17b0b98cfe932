"""The reader of benchmarks/gpu_budgets.toml: later rules win, and each kind of broken limit is reported by name."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import gpu_budgets

FACTS = {"kernel": "attention_forward_kernel", "target": "sm90", "dtype": "bfloat16", "head_dim": 64}
MEASURED = {"spills": 0, "shared": 1000, "registers": 100, "blocks": 2, "mma": "wgmma"}


def test_later_rules_override_single_limits():
    rules = [
        {"kernel": "*", "spills": 0, "blocks": 1},
        {"kernel": ["gelu*", "attention_*"], "head_dim": [64, 128], "blocks": 2},
        {"target": "sm80", "blocks": 3},
        {"dropout": True, "blocks": 4},
    ]
    assert gpu_budgets.limits(rules, FACTS) == {"spills": 0, "blocks": 2}


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ({"shared": 999}, "shared is 1000; the budget allows 999"),
        ({"registers": 99}, "registers is 100; the budget allows 99"),
        ({"blocks": 3}, "blocks is 2; the budget asks for at least 3"),
        ({"mma": "mma.sync"}, "mma is 'wgmma'; the budget asks for 'mma.sync'"),
    ],
)
def test_a_broken_limit_names_the_kernel(limit, said):
    (message,) = gpu_budgets.violations([limit], FACTS, MEASURED)
    assert said in message
    assert message.startswith("attention_forward_kernel, target sm90, dtype bfloat16, head_dim 64: ")


def test_kept_limits_are_silent():
    rules = [{"spills": 0, "shared": 1000, "registers": 100, "blocks": 2, "mma": "wgmma"}]
    assert gpu_budgets.violations(rules, FACTS, MEASURED) == []


def test_a_misspelt_key_is_refused(tmp_path):
    file = tmp_path / "budgets.toml"
    file.write_text('[[triton]]\nkernel = "*"\nspill = 0\n')
    with pytest.raises(ValueError, match="rule 1 of .* has spill; expected only"):
        gpu_budgets.load("triton", file)


def test_the_project_has_rules_for_triton():
    assert {"kernel": "*", "spills": 0, "blocks": 1} in gpu_budgets.load("triton")
