"""Which backend runs an operation: the `backend=` argument, else FASTTUNE_BACKEND, else the best one for the tensor.

`"torch"` is the reference composition in `_reference/`, always available. An explicit request never falls back: when it
cannot run here it raises and says why. `"auto"` never raises, but under torch.jit.trace (see `_transforms`). It takes
torch on the meta device, for shapes, and under the transforms of torch.func, whose derivatives the kernels lack.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from fasttune.ops import _cpp, _cuda, _transforms

BACKENDS = ("cpp", "triton", "cuda", "torch")

# operation -> the backends that implement it besides "torch"; filled by the operation files at import.
_implemented: dict[str, tuple[str, ...]] = {}

# (operation, backend) -> elements of the tensor that decides below which "auto" takes torch instead, because a launch
# costs more than the fused pass saves. Each entry names the measurement it comes from. Empty: the GPU backends have not
# been timed yet.
TORCH_WINS_BELOW: dict[tuple[str, str], int] = {}

# Operations for which "auto" takes the CUDA C++ kernels before Triton's, where they run. Each entry names the
# measurement it comes from (benchmarks/gpu.py races the two). Empty, for the same reason.
CUDA_BEATS_TRITON: frozenset[str] = frozenset()


def declare(operation: str, *backends: str) -> None:
    _implemented[operation] = backends


def operations() -> tuple[str, ...]:
    return tuple(sorted(_implemented))


def why_not(operation: str, backend: str, device: str | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why `backend` cannot run `operation` here (on that device and dtype), or None if it can."""
    if backend == "torch":
        return None
    if backend not in _implemented[operation]:
        return f"{operation} has no {backend} implementation"
    if backend == "cpp":
        if _cpp.library is None:
            return _cpp.unavailable_reason
        if device is not None and device != "cpu":
            return f"the cpp backend runs on CPU tensors, these are on {device}"
    elif backend == "triton":
        if device is not None and device not in ("cpu", "cuda"):
            return f"the triton backend runs on CUDA and ROCm tensors, these are on {device}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device == "cpu" and not interpreted:
            return "the triton backend runs on CUDA and ROCm tensors, and on CPU tensors only under TRITON_INTERPRET=1"
        if device is None and not interpreted and not torch.cuda.is_available():
            return "no CUDA or ROCm device is available"
    elif backend == "cuda":
        reason = _cuda.why_not(device)
        if reason is not None:
            return reason
    if dtype is not None and dtype not in _cpp.DTYPE_CODES:
        return f"the {backend} backend computes in float32, bfloat16 and float16, these tensors are {dtype}"
    return None


def choose(operation: str, tensor: torch.Tensor, backend: str | None) -> str:
    """The backend that runs `operation` on `tensor`.

    Raises ValueError for an unknown name and RuntimeError for an explicit request that cannot run.
    """
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"{operation}: backend is {backend!r}; expected a name or None.")
    environment = os.environ.get("FASTTUNE_BACKEND") or None
    chosen = _choose(operation, tensor.device.type, tensor.dtype, backend, environment)
    if chosen != "torch":
        if _transforms.tracing():
            _transforms.refuse_trace(operation)
        if _transforms.transformed():
            if (backend or environment or "auto") == "auto":
                return "torch"
            if _transforms.in_functorch():
                _transforms.refuse_transform(operation)
    if TORCH_WINS_BELOW and (backend or environment or "auto") == "auto":
        return "torch" if tensor.numel() < TORCH_WINS_BELOW.get((operation, chosen), 0) else chosen
    return chosen


_chosen: dict[tuple[str, str, torch.dtype, str | None, str | None], str] = {}


def _choose(operation: str, device: str, dtype: torch.dtype, backend: str | None, environment: str | None) -> str:
    key = (operation, device, dtype, backend, environment)
    if key not in _chosen:
        _chosen[key] = _decide(*key)
    return _chosen[key]


# What @torch.compiler.assume_constant_result does; the decorator itself imports torch._dynamo (and triton, sympy, ...),
# which takes longer than importing torch.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _decide(operation: str, device: str, dtype: torch.dtype, backend: str | None, environment: str | None) -> str:
    requested = backend or environment or "auto"
    if requested == "auto":
        preferred = ["cpp"] if device == "cpu" else ["triton"]
        if device != "cpu" and operation in CUDA_BEATS_TRITON:
            preferred.insert(0, "cuda")
        return next((name for name in preferred if why_not(operation, name, device, dtype) is None), "torch")
    source = "backend=" if backend is not None else "FASTTUNE_BACKEND="
    if requested not in BACKENDS:
        raise ValueError(f"{source}{requested!r} is unknown; expected one of {', '.join(BACKENDS)} or auto.")
    reason = why_not(operation, requested, device, dtype)
    if reason is not None:
        raise RuntimeError(f"{source}{requested!r} was asked for {operation}, but {reason}.")
    return requested


def available_backends(op: str) -> tuple[str, ...]:
    """Backends of `op` (for example "attention") that can run on this machine, best first; "torch" is always last.

    Raises ValueError if there is no such operation.
    """
    if op not in _implemented:
        raise ValueError(f"op is {op!r}; expected one of {', '.join(operations())}.")
    return tuple(backend for backend in BACKENDS if why_not(op, backend) is None)
