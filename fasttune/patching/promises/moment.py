"""The forward pass that made a promise: what it ran under, and whether its weights are still there.

A promised row has the value that the forward pass would have given it, whenever it is read. So each promise remembers
autocast and gradient mode, and which weights wanted a gradient; and it notices weights that were written since:
optimizers tell of their steps (fused ones do not raise version counters), addresses show what was moved or exchanged,
and on a CPU a fingerprint of sampled values shows writes through `.data`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

CHANGED = (
    "fasttune: these values were not computed during the forward pass, because nothing had read them, and the weights"
    " they depend on have changed since (an optimizer step?). Read them before the step, or patch with"
    " fasttune.patch(model, loss=False, trim=False, packing=False) to have them computed always."
)

_SAMPLES = 8  # of each weight's values
_written: dict[int, int] = {}  # address of a weight's memory -> the number of the last optimizer step that wrote it
_steps = 0


def _note_step(optimizer: Any, *_: Any) -> None:
    """Remembers which weights an optimizer has written."""
    global _steps
    _steps += 1
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                _written[parameter.data_ptr()] = _steps


register_optimizer_step_post_hook(_note_step)


class Weights:
    """The weights that promised rows depend on, as they were."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = tuple(tensors)
        self._wanted = [t.requires_grad for t in self.tensors]
        self._steps = _steps
        self._states = [(_version(t), t.data_ptr()) for t in self.tensors]
        self._samples = self._sample()

    def _sample(self) -> Tensor | None:
        """A few values of each weight, in one tensor on its device."""
        if any(t.device.type != "cpu" for t in self.tensors):
            return None
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            parts = [_sampled(t.detach()) for t in self.tensors if t.numel()]
            return torch.cat(parts) if parts else None

    def check(self) -> None:
        """Raises RuntimeError if one of them was written since."""
        for tensor, (version, address) in zip(self.tensors, self._states, strict=True):
            if _version(tensor) != version or tensor.data_ptr() != address or _written.get(address, 0) > self._steps:
                raise RuntimeError(CHANGED)
        if self._samples is None or self._samples.device.type != "cpu":
            return  # on a GPU the host would wait for the comparison, at each read
        now = self._sample()
        if now is None or not _same_bits(now, self._samples):
            raise RuntimeError(CHANGED)

    @contextmanager
    def wanting(self) -> Iterator[None]:
        """Within it each weight wants a gradient as it did: it may have been frozen or unfrozen meanwhile."""
        turned = [
            (t, wanted)
            for t, wanted in zip(self.tensors, self._wanted, strict=True)
            if t.requires_grad != wanted and t.is_leaf
        ]
        for tensor, wanted in turned:
            tensor.requires_grad_(wanted)
        try:
            yield
        finally:
            for tensor, wanted in turned:
                tensor.requires_grad_(not wanted)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _sampled(tensor: Tensor) -> Tensor:
    """Every n-th value; a view where that is possible, for this is done for each weight of each layer of a step."""
    tensor = tensor if tensor.is_contiguous() else tensor.contiguous()
    step = max(1, tensor.numel() // _SAMPLES)
    samples = tensor.as_strided((-(-tensor.numel() // step),), (step,))
    return samples if samples.dtype is torch.float32 else samples.to(torch.float32)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and torch.equal(a.view(torch.int32), b.view(torch.int32))


class Moment:
    """Autocast and gradient mode of a forward pass on a device."""

    def __init__(self, device: torch.device) -> None:
        self.kind = device.type
        self.autocast = torch.is_autocast_enabled(self.kind)
        self.dtype = torch.get_autocast_dtype(self.kind)
        self.gradient = torch.is_grad_enabled()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within it everything is computed as it would have been then. What autograd saves is saved plainly: a
        checkpoint around the reader runs the reader twice, but these rows are computed once."""
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            if self.gradient != torch.is_grad_enabled():
                stack.enter_context(torch.set_grad_enabled(self.gradient))
            if (self.autocast, self.dtype) != (
                torch.is_autocast_enabled(self.kind),
                torch.get_autocast_dtype(self.kind),
            ):
                stack.enter_context(torch.autocast(self.kind, dtype=self.dtype, enabled=self.autocast))
            if self.gradient:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is))
            yield


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
