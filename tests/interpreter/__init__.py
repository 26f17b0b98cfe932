"""Triton's interpreter, made fit to judge a kernel: faithful bfloat16, and checks on every memory access.

Set TRITON_INTERPRET=1 before triton is imported, then call `install()` once. It hooks private functions of Triton, so
it refuses any version whose hooks nobody has checked. To check a new one, add it to CHECKED_VERSIONS, compare the
hooked functions' signatures and run tests/kernels/test_triton_interpreter.py.

What it proves: algorithm, masks, indices, rounding, independence of programs. What it cannot: code generation,
synchronisation inside one program, speed.
"""

from __future__ import annotations

import os

CHECKED_VERSIONS = ("3.9.0",)

_installed = False


def check_version(version: str) -> None:
    if version not in CHECKED_VERSIONS:
        raise RuntimeError(
            f"Triton {version} is installed; the interpreter's hooks were checked with {', '.join(CHECKED_VERSIONS)}"
            " alone. See the docstring of tests/interpreter/__init__.py for how to check another version."
        )


def install() -> None:
    """Patches Triton's interpreter in this process.

    Raises RuntimeError without TRITON_INTERPRET=1 or on a version of Triton that was not checked.
    """
    global _installed
    if _installed:
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET is not 1; it must be set before triton is imported.")
    import triton

    check_version(triton.__version__)
    from interpreter import bf16, memory

    bf16.install()
    memory.install()
    _installed = True
