"""Seeds of the shared dropout generator, and its options."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fasttune.ops._checks import check_number


class _Replay(threading.local):
    draws: list[torch.Tensor] | None = None
    next = 0


_replay = _Replay()


@contextmanager
def repeating(seeds: list[torch.Tensor]) -> Iterator[None]:
    """Within it the i-th call of `draw_seed` returns seeds[i]; a seed that is not there yet is drawn and appended."""
    before = _replay.draws, _replay.next
    _replay.draws, _replay.next = seeds, 0
    try:
        yield
    finally:
        _replay.draws, _replay.next = before


def draw_seed(device: torch.device) -> torch.Tensor:
    """A fresh 64-bit seed, int64 (1,), from torch's generator of that device.

    It stays a tensor: a CUDA seed never travels to the host (no synchronisation, and a captured graph draws a new one
    at every replay), torch.manual_seed reproduces it, and checkpointing's saved generator state regenerates it.
    """
    if torch.compiler.is_compiling() or _replay.draws is None:
        return _draw(device)
    if _replay.next == len(_replay.draws):
        _replay.draws.append(_draw(device))
    _replay.next += 1
    return _replay.draws[_replay.next - 1]


def _draw(device: torch.device) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def check_probability(operation: str, dropout_p: float) -> None:
    check_number(operation, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{operation}: dropout_p is {dropout_p}; expected a probability between 0 and 1.")
