"""Labels and ids: integer tensors that index a table. Out of range, they raise before any memory is touched."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune.ops import _cpp
from fasttune.ops._checks import check_tensor, describe

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_NO_EXEMPTION = -(2**63)


def check_integers(operation: str, name: str, tensor: Tensor) -> None:
    check_tensor(operation, name, tensor, "a torch.Tensor of integers")
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{operation}: {name} is {describe(tensor)}; expected integers, such as int64.")


def check_range(operation: str, name: str, indices: Tensor, size: int, exempt: int | None = None) -> None:
    """IndexError, naming the position, if an int64 index lies outside [0, size) and is not `exempt`.

    For CPU tensors with data; on other devices the kernels guard themselves, as looking would stall the device.
    """
    if _cpp.library is not None:
        indices = indices.contiguous()
        exemption = _NO_EXEMPTION if exempt is None else exempt
        first = _cpp.library.first_outside(indices.data_ptr(), indices.numel(), size, exemption)
    else:
        wrong = (indices < 0) | (indices >= size)
        if exempt is not None:
            wrong &= indices != exempt
        first = int(wrong.flatten().byte().argmax()) if bool(wrong.any()) else -1
    if first < 0:
        return
    position = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), indices.shape))
    where = position[0] if len(position) == 1 else position
    besides = "" if exempt is None else f" or {exempt} (ignore_index)"
    value = int(indices.flatten()[first])
    known = f"a value from 0 to {size - 1}" if size else "none, as there is nothing to choose from,"
    raise IndexError(f"{operation}: {name} at position {where} is {value}; expected {known}{besides}.")
