"""Which fused backend tests/ops test in this process: the C++ library or, under TRITON_INTERPRET=1, the Triton kernels
in their interpreter. Both answer to the same tests; sizes differ, since the interpreter takes a thousand times as long.
"""

import os
from typing import TypeVar

import pytest

from fasttune import ops

T = TypeVar("T")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FUSED = "triton" if INTERPRETED else "cpp"

BACKENDS = (
    ("triton",) if INTERPRETED else ("cpp", "torch")
)  # what a test goes through that the reference answers to too

needs_fused = pytest.mark.skipif(FUSED not in ops.available_backends("attention"), reason="no compiled library")
cpp_only = pytest.mark.skipif(INTERPRETED, reason="of the C++ library")
triton_only = pytest.mark.skipif(not INTERPRETED, reason="of the Triton kernels, which need TRITON_INTERPRET=1 here")
reference_only = pytest.mark.skipif(INTERPRETED, reason="of the reference, which the C++ run has tested")


def either(cpp: T, triton: T) -> T:
    """What the tests of each backend go through: shapes, options, a number of examples."""
    return triton if INTERPRETED else cpp
