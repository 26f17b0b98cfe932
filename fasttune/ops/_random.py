"""Seeds of the shared dropout generator, and its options."""

from __future__ import annotations

import torch


def draw_seed(device: torch.device) -> torch.Tensor:
    """A fresh 64-bit seed, int64 (1,), from torch's generator of that device.

    It stays a tensor: a CUDA seed never travels to the host (no synchronisation, and a captured graph draws a new one
    at every replay), torch.manual_seed reproduces it, and checkpointing's saved generator state regenerates it.
    """
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def check_probability(operation: str, dropout_p: float) -> None:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{operation}: dropout_p is {dropout_p}; expected a probability between 0 and 1.")
