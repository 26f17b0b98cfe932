"""These tests compile the CUDA kernels with nvcc for GPUs that need not be there; they run nothing."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
