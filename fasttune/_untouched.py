"""Leaving no trace: random generators, lent modules, dropout off, moved weights. For `fasttune.verify`."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MOVED = 0.01  # relative, at most


@contextmanager
def random_state() -> Iterator[None]:
    """Random generators of torch, Python and numpy as they were."""
    cpu, python = torch.random.get_rng_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    numpy = sys.modules.get("numpy")
    drawn = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        torch.random.set_rng_state(cpu)
        random.setstate(python)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if numpy is not None and drawn is not None:
            numpy.random.set_state(drawn)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


@contextmanager
def lent(model: nn.Module) -> Iterator[nn.Module]:
    """`model` itself with parameters and buffers of its own, so that neither the caller's values, nor gradients, nor
    hooks on parameters take part; afterwards every attribute of every module is as it was."""
    saved = [
        (module, dict(vars(module)), dict(module._parameters), dict(module._buffers)) for module in model.modules()
    ]
    configs = {id(value): value for _, attributes, _, _ in saved for value in attributes.values() if _is_config(value)}
    settings = [(config, dict(vars(config))) for config in configs.values()]  # a forward writes problem_type into it
    fresh: dict[int, Any] = {id(None): None}
    try:
        for module, _, parameters, buffers in saved:
            for name, value in parameters.items():
                if id(value) not in fresh and value is not None:
                    fresh[id(value)] = nn.Parameter(value.detach().clone(), value.requires_grad)
                module._parameters[name] = fresh[id(value)]
            for name, buffer in buffers.items():
                if id(buffer) not in fresh and buffer is not None:
                    fresh[id(buffer)] = buffer.detach().clone()
                module._buffers[name] = fresh[id(buffer)]
        yield model
    finally:
        for module, attributes, parameters, buffers in saved:
            vars(module).clear()
            vars(module).update(attributes)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
        for config, attributes in settings:
            vars(config).clear()
            vars(config).update(attributes)


@contextmanager
def without_dropout(side: nn.Module) -> Iterator[None]:
    """Every probability of dropout 0: of modules, of attributes named after it, and in configs."""
    changed: list[tuple[Any, str, float]] = []

    def silence(owner: Any, names: Sequence[str]) -> None:
        for name in names:
            value = vars(owner)[name]
            if isinstance(value, float) and value:
                changed.append((owner, name, value))
                vars(owner)[name] = 0.0
            elif _is_config(value):
                silence(value, dropping(value))

    def dropping(owner: Any) -> list[str]:
        return [name for name in vars(owner) if "drop" in name or name.endswith("config")]

    for module in side.modules():
        silence(module, dropping(module))
        if isinstance(module, nn.modules.dropout._DropoutNd):
            silence(module, ["p"])
    try:
        yield
    finally:
        for owner, name, value in reversed(changed):
            vars(owner)[name] = value


def _is_config(value: Any) -> bool:
    return type(value).__name__.endswith("Config") and hasattr(value, "__dict__")


def move_weights(side: nn.Module, seed: int, moved: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replaces each floating weight by moved(weight, noise); noise: uniform in [-1, 1), the same on every side."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in side.parameters():
            if parameter.is_floating_point():
                noise = torch.rand(parameter.shape, generator=generator) * 2 - 1
                parameter.copy_(moved(parameter, noise.to(parameter.device, parameter.dtype)))


def by_a_percent(weight: Tensor, noise: Tensor) -> Tensor:
    return weight * (1 + MOVED * noise)


def by_one_ulp(weight: Tensor, noise: Tensor) -> Tensor:
    return weight * (1 + torch.finfo(weight.dtype).eps * torch.where(noise < 0, -1, 1))


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device; None if nobody says."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu":
        try:
            for line in Path("/proc/meminfo").read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass
    return None
