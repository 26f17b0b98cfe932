"""Reaches the Triton kernels without importing triton before one is called: fasttune works without it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def lazy(module: str, function: str) -> Callable[..., Any]:
    """`fasttune.kernels.<module>.<function>`, imported at its first call."""
    target: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal target
        if target is None:
            target = getattr(importlib.import_module(f"fasttune.kernels.{module}"), function)
        return target(*args)

    return call
