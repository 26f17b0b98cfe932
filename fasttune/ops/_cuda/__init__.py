"""Loads the compiled CUDA library `fasttune._cuda` and starts its kernels; one file per operation beside this one.

`library` is None where it was not built. It loads without a GPU, a driver or a CUDA build of torch; `why_not` says
what is missing to run it. The tests put a build for the host in its place, with `emulated` set: see tests/cuda_host.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

library: Any = None  # the module fasttune._cuda
unavailable_reason = ""
emulated = False  # `library` runs the kernels on CPU tensors

FIRST_CAPABILITY = (8, 0)


def _load() -> None:
    global library, unavailable_reason
    try:
        library = importlib.import_module("fasttune._cuda")
    except ImportError as error:
        unavailable_reason = (
            f"the compiled CUDA library is not there ({error}); install nvcc and reinstall, or in a checkout run"
            " `python setup.py build_ext --inplace`"
        )


def why_not(device: str | None) -> str | None:
    """Why the kernels cannot run here (on tensors of that kind of device), or None if they can."""
    if library is None:
        return unavailable_reason
    kind = "cpu" if emulated else "cuda"
    if device is not None and device != kind:
        return f"the cuda backend runs on {kind.upper()} tensors, these are on {device}"
    if emulated:
        return None
    if torch.version.hip:
        return f"the cuda backend is for NVIDIA's GPUs, this torch is built for ROCm {torch.version.hip}"
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return "no CUDA device is available: this torch is a CPU build"
        return f"no CUDA device is available ({library.problem() or 'torch finds none'})"
    capability = torch.cuda.get_device_capability()
    if capability < FIRST_CAPABILITY:
        return f"the kernels need compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    return library.problem() or None


def call(function: str, like: Tensor, *args: Any) -> None:
    """`library.function(*args, stream)` on the current stream of the device of `like`, without waiting for it."""
    kernel = getattr(library, function)
    if emulated:
        kernel(*args, 0)
        return
    with torch.cuda.device(like.device):
        kernel(*args, torch.cuda.current_stream(like.device).cuda_stream)


def multiprocessors(device: torch.device) -> int:
    """How many blocks run at once if each fills a multiprocessor: the size of a persistent grid."""
    if emulated:
        return 3  # few enough that blocks loop, odd so that the last one is short of work
    return torch.cuda.get_device_properties(device).multi_processor_count


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


_load()
