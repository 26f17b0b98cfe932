"""Reads benchmarks/gpu_budgets.toml and says which limits a compiled kernel breaks. For any backend's compiler.

rules = load("triton")
broken = violations(rules, {"kernel": "dropout_kernel", "target": "sm90", "dtype": "bfloat16"}, {"spills": 8, ...})
"""

from __future__ import annotations

import fnmatch
import tomllib
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_budgets.toml"
CONDITIONS = ("kernel", "target", "dtype", "head_dim", "dropout")
AT_MOST = ("spills", "shared", "registers")
AT_LEAST = ("blocks",)
EXACTLY = ("mma",)
LIMITS = AT_MOST + AT_LEAST + EXACTLY


def load(backend: str, file: Path = FILE) -> list[dict[str, Any]]:
    """The rules of one backend. Raises ValueError for a key that is neither a condition nor a limit."""
    rules: list[dict[str, Any]] = tomllib.loads(file.read_text()).get(backend, [])
    for number, rule in enumerate(rules, 1):
        unknown = sorted(set(rule) - {*CONDITIONS, *LIMITS})
        if unknown:
            raise ValueError(
                f"{file.name}: rule {number} of [[{backend}]] has {', '.join(unknown)};"
                f" expected only {', '.join((*CONDITIONS, *LIMITS))}."
            )
    return rules


def _fits(wanted: Any, fact: Any) -> bool:
    choices = wanted if isinstance(wanted, list) else [wanted]
    if isinstance(fact, str):
        return any(fnmatch.fnmatchcase(fact, choice) for choice in choices)
    return fact in choices


def limits(rules: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """What the rules ask of a kernel. facts: values of the conditions; one that is left out fits no condition."""
    found: dict[str, Any] = {}
    for rule in rules:
        if all(key in facts and _fits(rule[key], facts[key]) for key in CONDITIONS if key in rule):
            found.update({key: rule[key] for key in LIMITS if key in rule})
    return found


def violations(rules: list[dict[str, Any]], facts: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """One sentence, with the kernel's name, for each limit that is broken."""
    name = ", ".join(str(value) if key == "kernel" else f"{key} {value}" for key, value in facts.items())
    messages = []
    for key, limit in limits(rules, facts).items():
        value = measured[key]
        if key in AT_MOST and value > limit:
            messages.append(f"{name}: {key} is {value}; the budget allows {limit}.")
        elif key in AT_LEAST and value < limit:
            messages.append(f"{name}: {key} is {value}; the budget asks for at least {limit}.")
        elif key in EXACTLY and value != limit:
            messages.append(f"{name}: {key} is {value!r}; the budget asks for {limit!r}.")
    return messages
