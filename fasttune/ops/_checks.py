"""Argument checks shared by the operations: before any memory is touched, naming what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)} on {tensor.device}"


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on; the meta device has none, and asking about it raises."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def check_tensor(operation: str, name: str, tensor: object, expected: str = "a torch.Tensor") -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{operation}: {name} is a {type(tensor).__name__}; expected {expected}.")


def check_integer(operation: str, name: str, value: object) -> None:
    if not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{operation}: {name} is {value!r}; expected an integer.")


def check_number(operation: str, name: str, value: object) -> None:
    if not isinstance(value, (float, int, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{operation}: {name} is {value!r}; expected a number.")


def check_floating(operation: str, name: str, tensor: torch.Tensor) -> None:
    check_tensor(operation, name, tensor)
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{operation}: {name} is {describe(tensor)}; expected a floating-point tensor.")


def check_shape(operation: str, name: str, tensor: torch.Tensor, shape: Sequence[int], meaning: str = "") -> None:
    check_tensor(operation, name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        because = f" ({meaning})" if meaning else ""
        raise ValueError(f"{operation}: {name} is {describe(tensor)}; expected shape {tuple(shape)}{because}.")


def check_device(operation: str, name: str, tensor: torch.Tensor, device: torch.device, like: str) -> None:
    if tensor.device != device:
        raise ValueError(f"{operation}: {name} is {describe(tensor)}; expected it on {device} like {like}.")


def check_parameter(operation: str, name: str, tensor: torch.Tensor | None, size: int, x: torch.Tensor) -> None:
    """A weight or bias (size,) that goes with x (..., size): on x's device, in x's dtype or float32."""
    if tensor is None:
        return
    if isinstance(tensor, torch.Tensor) and tensor.dtype == x.dtype and tensor.shape == (size,):
        check_device(operation, name, tensor, x.device, "x")
        return  # the usual case, in one glance
    check_floating(operation, name, tensor)
    check_shape(operation, name, tensor, (size,), "the last dimension of x")
    check_device(operation, name, tensor, x.device, "x")
    if tensor.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{operation}: {name} is {describe(tensor)}; expected {x.dtype} like x, or float32.")


def check_linear(operation: str, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """input (..., C), linear_weight (V, C) and linear_bias (V,) or None of a linear layer with V classes."""
    check_floating(operation, "input", input)
    check_floating(operation, "linear_weight", weight)
    if input.dim() == 0 or weight.dim() != 2 or weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"{operation}: input is {describe(input)} and linear_weight is {describe(weight)};"
            " expected shapes (..., C) and (V, C)."
        )
    check_device(operation, "linear_weight", weight, input.device, "input")
    if bias is not None:
        check_floating(operation, "linear_bias", bias)
        check_shape(operation, "linear_bias", bias, weight.shape[:1], "one per class")
        check_device(operation, "linear_bias", bias, input.device, "input")
    for name, parameter in (("linear_weight", weight), ("linear_bias", bias)):
        if parameter is None or parameter.dtype in (input.dtype, torch.float32) or autocasts(input.device):
            continue
        raise TypeError(f"{operation}: {name} is {describe(parameter)}; expected {input.dtype} like input, or float32.")


def check_columns(operation: str, x: torch.Tensor) -> None:
    """x (..., columns)."""
    check_floating(operation, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{operation}: x is {describe(x)}; expected at least one dimension, the last one columns.")


def check_row_ids(operation: str, row_ids: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """Contiguous logical row numbers int64 (rows,) of x (..., columns), rows = x.numel() / columns."""
    if row_ids is None:
        return None
    check_shape(operation, "row_ids", row_ids, (x.numel() // max(x.shape[-1], 1),), "one per row of x")
    check_device(operation, "row_ids", row_ids, x.device, "x")
    if row_ids.dtype != torch.int64:
        raise TypeError(f"{operation}: row_ids is {row_ids.dtype}; expected int64.")
    return row_ids.contiguous()


def check_approximate(operation: str, approximate: str) -> bool:
    """Whether the GELU that `approximate` names is the tanh form."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{operation}: approximate is {approximate!r}; expected 'none' or 'tanh'.")
    return approximate == "tanh"
