"""One point of the space that is searched. Printed, it says how to make it again."""

from collections.abc import Callable
from dataclasses import dataclass

from modes import Mode


def _named(value):
    if isinstance(value, tuple):
        return " + ".join(map(_named, value))
    return getattr(value, "__name__", None) or str(value)


@dataclass(frozen=True)
class Case:
    head: str
    attention: str
    structure: Callable
    padding: Callable
    call: Callable
    mode: Mode
    between: Callable
    readers: tuple[Callable, ...]

    def __repr__(self):
        parts = (self.head, self.attention, self.structure, self.padding, self.call, self.mode, self.between)
        return f"<{', '.join(map(_named, (*parts, self.readers)))}>"
