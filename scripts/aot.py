"""Compiles what the library would launch on a GPU, on a machine that has none, and reads the result.

`compile_launches(call, target)` runs a call of the library's own launchers on fake CUDA tensors; every kernel launch in
it is compiled for the target instead of run, with the argument types, alignment and tile sizes it had. No driver and no
CUDA build of torch is needed: Triton's wheel carries its own ptxas and nvdisasm. Works with Triton 3.6 and 3.9.

What it proves: that it compiles, and what the compiler made of it (registers, spills, shared memory, occupancy, kind of
matrix instruction). What it cannot: that the result is right, and speed.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction, MockTensor

from fasttune.kernels import launch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # its default differs from version to version

MULTIPROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148, "gfx942": 304}

# What a multiprocessor holds: registers, shared memory, shared memory of one block, warps, blocks.
# CUDA C++ Programming Guide, table of compute capabilities 8.0, 9.0 and 10.0.
NVIDIA_LIMITS = {
    "sm80": (65536, 167936, 166912, 64, 32),
    "sm90": (65536, 233472, 232448, 64, 32),
    "sm100": (65536, 233472, 232448, 64, 32),
}
# A compute unit of gfx942: four SIMDs of 512 registers a lane (VGPR and AGPR together) and 8 waves; 64 KiB of LDS.
AMD_REGISTERS, AMD_WAVES, AMD_LDS = 512, 8, 65536


class StubDriver(DriverBase):
    """As much of a driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(ty)

    def get_benchmarker(self) -> Any:
        raise RuntimeError("There is no GPU to time on.")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One kernel for one target. `blocks` is how many of its blocks a multiprocessor holds at once."""

    kernel: str
    target: str
    warps: int
    registers: int
    spills: int  # bytes on NVIDIA, registers on AMD
    shared: int  # bytes
    blocks: int
    mma: str  # the kind of matrix instruction, "" if none
    fits: bool  # shared memory within what a block may have


def gpu_target(name: str) -> GPUTarget:
    return GPUTarget("cuda", int(name[2:]), 32) if name.startswith("sm") else GPUTarget("hip", name, 64)


def compile_launches(call: Callable[[], Any], target: str) -> list[Compiled]:
    """Every kernel launched by `call()`, which makes its own tensors on device "cuda", compiled for `target`."""
    results: list[Compiled] = []

    def compile_only(run: Callable[..., Any], kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        kernel.device_caches.clear()  # keyed by device, which stays 0 when the target changes
        results.append(inspect(kernel.__name__, run(kernel, *args, warmup=True, **options), target))

    _with_launches(call, target, compile_only)
    return results


def specialisations(call: Callable[[], Any], target: str) -> set[tuple[str, str]]:
    """(kernel, version) of every launch in `call()`: one version for each set of argument types, alignments and
    constants that Triton would compile anew. Nothing is compiled."""
    found: set[tuple[str, str]] = set()

    def note(run: Callable[..., Any], kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        kernel.device_caches.clear()
        kernel._do_compile = lambda key, *_: found.add((kernel.__name__, str(key)))
        try:
            run(kernel, *args, warmup=True, **options)
        finally:
            del kernel._do_compile

    _with_launches(call, target, note)
    return found


def _with_launches(call: Callable[[], Any], target: str, act: Callable[..., None]) -> None:
    """Runs `call()` on fake tensors; each launch becomes `act(JITFunction.run, kernel, arguments, options)`."""
    triton.runtime.driver.set_active(StubDriver(gpu_target(target)))
    launch.target.cache_clear()
    run, multiprocessors = JITFunction.run, launch.multiprocessors

    def launched(self: Any, *args: Any, warmup: bool, **options: Any) -> None:
        act(run, self, tuple(MockTensor(arg.dtype) if isinstance(arg, FakeTensor) else arg for arg in args), options)

    JITFunction.run = launched  # type: ignore[method-assign]
    launch.multiprocessors = lambda device: MULTIPROCESSORS[target]  # type: ignore[assignment]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            call()
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
        launch.multiprocessors = multiprocessors


def inspect(name: str, kernel: Any, target: str) -> Compiled:
    return _inspect_nvidia(name, kernel, target) if target.startswith("sm") else _inspect_amd(name, kernel, target)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def _inspect_nvidia(name: str, kernel: Any, target: str) -> Compiled:
    arch = int(target[2:])
    ptxas = get_ptxas(arch).path
    suffix = "a" if arch >= 90 else ""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        command = [ptxas, "-v", f"--gpu-name=sm_{arch}{suffix}", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = _number(r"Used (\d+) registers", log)
    spills = _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log)
    ptx = kernel.asm["ptx"]
    kinds = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma.sync"}
    mma = next((kind for instruction, kind in kinds.items() if instruction in ptx), "")
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    if getattr(kernel.metadata, "global_scratch_size", 0):
        raise RuntimeError(f"{name}: the compiler wants global scratch memory")
    file_registers, file_shared, block_shared, most_warps, most_blocks = NVIDIA_LIMITS[target]
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = (file_registers // 4 // per_warp) * 4 // warps
    by_shared = file_shared // (-(-(shared + 1024) // 128) * 128)
    blocks = min(by_registers, by_shared, most_warps // warps, most_blocks)
    return Compiled(name, target, warps, registers, spills, shared, blocks, mma, shared <= block_shared)


def _inspect_amd(name: str, kernel: Any, target: str) -> Compiled:
    text = kernel.asm["amdgcn"]
    vgprs, agprs = _number(r"\.vgpr_count:\s+(\d+)", text), _number(r"\.agpr_count:\s+(\d+)", text)
    spills = _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    lds, warps = kernel.metadata.shared, kernel.metadata.num_warps
    registers = max(vgprs, agprs)  # vgpr_count is the sum on gfx942
    waves = min(AMD_WAVES, AMD_REGISTERS // max(8, -(-registers // 8) * 8))
    blocks = min(waves * 4 // warps, AMD_LDS // lds if lds else 32)
    mma = "mfma" if "v_mfma" in text else ""
    return Compiled(name, target, warps, registers, spills, lds, blocks, mma, lds <= AMD_LDS)
