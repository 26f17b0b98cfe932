"""The arguments of `fasttune.patch`, checked."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from fasttune.ops import _backends

GROUPS = ("attention", "norms", "mlp", "embeddings", "loss")


@dataclass(frozen=True)
class Options:
    """See `fasttune.patch`."""

    attention: bool = True
    norms: bool = True
    mlp: bool = True
    embeddings: bool = True
    loss: bool = True
    packing: bool | Literal["auto"] = "auto"
    trim: bool | Literal["auto"] = "auto"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in GROUPS and not isinstance(value, bool):
                raise TypeError(f"patch: {field.name} is {value!r}; expected True or False.")
            if field.name in ("packing", "trim") and not (isinstance(value, bool) or value == "auto"):
                raise TypeError(f"patch: {field.name} is {value!r}; expected True, False or 'auto'.")
        if self.backend not in (*_backends.BACKENDS, "auto"):
            expected = ", ".join((*_backends.BACKENDS, "auto"))
            raise ValueError(f"patch: backend is {self.backend!r}; expected one of {expected}.")

    def wants(self, group: str) -> bool:
        """group: one of GROUPS, or "packing or trim", which both need the layers."""
        return any(bool(getattr(self, name)) for name in group.split(" or "))

    @property
    def requested_backend(self) -> str | None:
        """What the operations take as `backend=`: None lets them choose."""
        return None if self.backend == "auto" else self.backend
