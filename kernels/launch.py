"""What the launchers share: the kind of device, tile arithmetic, the dropout arguments."""

import functools
import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def power_of_two(n: int, least: int = 1) -> int:
    return max(least, triton.next_power_of_2(n))


@functools.cache
def target(device: int | None = None) -> str:
    """ "sm80", "sm90", "sm100", ..., "gfx942", ... or "interpreter": the key of every table of tiles."""
    if INTERPRETED:
        return "interpreter"
    current = triton.runtime.driver.active.get_current_target()
    return f"sm{current.arch}" if current.backend == "cuda" else str(current.arch)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once if each fills a multiprocessor: the size of a persistent grid."""
    if INTERPRETED:
        return 3  # few enough that programs loop, odd so that the last one is short of work
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def tile_of(columns, COLUMNS: tl.constexpr):
    """This program's tile of rows and of COLUMNS columns, in a grid of one dimension: the others end at 65535."""
    tiles = tl.cdiv(columns, COLUMNS)
    return tl.program_id(0) // tiles, tl.program_id(0) % tiles


def warps(on_nvidia: int) -> int:
    """The number of warps that has as many lanes as `on_nvidia` warps of 32: a wave of gfx942 has 64."""
    return max(1, on_nvidia // 2) if target().startswith("gfx") else on_nvidia


def dropout_arguments(seed: torch.Tensor | None, dropout_p: float) -> tuple[int, float]:
    """(threshold, scale) of docs/dropout.md; 0 and 1 without a seed."""
    if seed is None:
        return 0, 1.0
    threshold = int(dropout_p * 65536.0 + 0.5)
    return threshold, 0.0 if threshold >= 65536 else 65536 / (65536 - threshold)
