"""Loads the compiled CPU library and hands it torch's thread pool. `library` is None where it was not built."""

from __future__ import annotations

import ctypes
import importlib
import os
from pathlib import Path
from typing import Any

import torch

_MAPPED_BYTES = 32 * 2**20  # glibc maps blocks from this size on, whatever it learned about the program
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cpu/dtype.h

library: Any = None  # the module fasttune._cpu
unavailable_reason = ""


def _torch_functions() -> tuple[int, int]:
    """Addresses of torch's C functions `torch_parallel_for` and `torch_get_num_threads`."""
    folder = Path(torch.__file__).parent / "lib"
    candidates = [path for pattern in ("libtorch_cpu.*", "torch_cpu.*") for path in folder.glob(pattern)]
    for path in candidates:
        if path.suffix in {".so", ".dylib", ".dll"}:
            loaded = ctypes.CDLL(str(path))  # already mapped by `import torch`: this only finds the handle
            functions = (loaded.torch_parallel_for, loaded.torch_get_num_threads)
            addresses = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions]
            return addresses[0], addresses[1]
    raise OSError(f"no libtorch_cpu in {folder}")


def _load() -> None:
    global library, unavailable_reason
    try:
        compiled = importlib.import_module("fasttune._cpu")
    except ImportError as error:
        unavailable_reason = (
            f"the compiled CPU library is not there ({error}); install a C++17 compiler and reinstall, or in a checkout"
            " run `python setup.py build_ext --inplace`"
        )
        return
    try:
        compiled.set_thread_pool(*_torch_functions())
    except (OSError, AttributeError) as error:
        unavailable_reason = f"torch {torch.__version__} does not export its thread pool ({error})"
        return
    isa = os.environ.get("FASTTUNE_CPU_ISA")
    if isa:
        compiled.select_isa(isa)  # unknown or unsupported names raise
    library = compiled


def address(tensor: torch.Tensor | None) -> int:
    """The address that the compiled library takes for a tensor; 0 stands for None."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_code(tensor: torch.Tensor | None) -> int:
    """The number of a tensor's dtype; any for None."""
    return 0 if tensor is None else DTYPE_CODES[tensor.dtype]


def empty_large(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """torch.empty on the CPU, behind huge pages if the block is one that the allocator maps anew at every call.

    A vocabulary-sized gradient is given back at every optimizer.zero_grad() and would fault in page by page at every
    step: filling 50257 x 768 float32 took 58 ms, 18 ms with huge pages (two 2.8 GHz threads of a virtual machine).
    """
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.nbytes >= _MAPPED_BYTES:
        library.prefer_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


_load()
