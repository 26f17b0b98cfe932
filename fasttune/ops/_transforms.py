"""What the fused operators cannot run under, and say: torch.jit.trace, forward-mode derivatives, torch.func.

Their kernels read addresses, so a trace would record uninitialised memory and a tangent would be lost. `auto` takes the
torch backend where a transform is on; a backend that was asked for raises one sentence.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

_functorch = torch._C._are_functorch_transforms_active  # of those that ask, the one that torch.compile understands
_tracing = torch._C._get_tracing_state

_INSTEAD = "use backend='torch' or FASTTUNE_BACKEND=torch, or fasttune.unpatch(model) first."


def public_name(operator: str) -> str:
    """Of an operator or its backward kernel."""
    return operator.removesuffix("_backward").removesuffix("_gradient")


def transformed() -> bool:
    """Whether a transform of torch.func or a level of dual numbers is on (or is_grads_batched, which is a vmap)."""
    return _functorch() or forward_ad._current_level >= 0


def in_functorch() -> bool:
    return bool(_functorch())


def tracing() -> bool:
    """Whether torch.jit.trace, or the exporter to ONNX that rests on it, records."""
    return not torch.compiler.is_compiling() and _tracing() is not None


def refuse(operator: str, args: tuple[Any, ...]) -> None:
    """Raises RuntimeError where `operator` would be recorded wrongly or lose a derivative."""
    if _tracing() is not None:
        refuse_trace(operator)
    if _functorch():
        refuse_transform(operator)
    if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
        raise RuntimeError(f"fasttune: {public_name(operator)} has no forward-mode derivative; {_INSTEAD}")


def refuse_trace(operator: str) -> NoReturn:
    raise RuntimeError(
        f"fasttune: {public_name(operator)} cannot be recorded by torch.jit.trace; use torch.export or torch.compile,"
        " backend='torch', or fasttune.unpatch(model) first."
    )


def refuse_transform(operator: str) -> NoReturn:
    raise RuntimeError(
        f"fasttune: {public_name(operator)} does not run under torch.func (grad, vmap, jvp, jacrev, hessian) or with"
        f" is_grads_batched=True; {_INSTEAD}"
    )


def _has_tangent(arg: Any) -> bool:
    return isinstance(arg, torch.Tensor) and forward_ad.unpack_dual(arg).tangent is not None
