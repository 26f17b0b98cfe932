"""Whether what describes a call of attention fits together, before any memory is touched."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from fasttune.ops._checks import check_device, check_floating, check_integer, check_shape, check_tensor, describe

_LAST_POSITION = 2**31 - 1  # kernels hold positions in int32,
_FAR = 2**30  # add a window to a key's number and subtract positions from it; nothing is so long

Terms = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # bias, c2p, p2c, buckets


def check_offsets(
    cu_seqlens: Tensor, rows: int, max_seqlen: int | None, name: str = "cu_seqlens", *, operation: str = "attention"
) -> list[int]:
    """Values of cu_seqlens on CPU, before they are used as offsets. Returns the lengths, raises ValueError."""
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != rows:
        of = "query" if name == "cu_seqlens_q" else "key" if operation == "attention" else "input"
        raise ValueError(
            f"{operation}: {name} runs from {offsets[0]} to {offsets[-1]}; expected 0 to {rows}, the rows of {of}."
        )
    lengths = list(map(operator.sub, offsets[1:], offsets))
    if min(lengths, default=0) < 0:
        at = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(
            f"{operation}: {name} falls from {offsets[at]} to {offsets[at + 1]} at position {at + 1};"
            " expected offsets that never decrease."
        )
    if max_seqlen is not None and max(lengths, default=0) > max_seqlen:
        raise ValueError(
            f"attention: max_seqlen is {max_seqlen}, but cu_seqlens holds a sequence of length {max(lengths)}."
        )
    return lengths


def check_offsets_tensor(operation: str, cu_seqlens: Tensor, device: torch.device, like: str) -> None:
    """All of cu_seqlens but its values."""
    check_tensor(operation, "cu_seqlens", cu_seqlens, "a torch.Tensor of integers")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{operation}: cu_seqlens is {describe(cu_seqlens)}; expected int32 or int64.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{operation}: cu_seqlens is {describe(cu_seqlens)}; expected shape (N + 1,).")
    check_device(operation, "cu_seqlens", cu_seqlens, device, like)


def check_positions(positions_q: Tensor, cu_seqlens_q: Tensor | None) -> None:
    """Values of positions_q and cu_seqlens_q on CPU, before they are used. Raises ValueError."""
    assert cu_seqlens_q is not None
    check_offsets(cu_seqlens_q, positions_q.shape[0], None, "cu_seqlens_q")
    counts = cu_seqlens_q.diff()
    outside = (positions_q < -_FAR) | (positions_q > _LAST_POSITION)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(
            f"attention: positions_q is {int(positions_q[at])} at row {at}; expected a position counted from the first"
            " key, from -2 ** 30 to 2 ** 31 - 1."
        )
    owner = torch.repeat_interleave(counts)
    falls = (positions_q.diff() < 0) & (owner.diff() == 0)
    if bool(falls.any()):
        at = int(falls.nonzero()[0]) + 1
        raise ValueError(
            f"attention: positions_q goes from {int(positions_q[at - 1])} to {int(positions_q[at])} at row {at};"
            " expected positions that never fall within a sequence."
        )


def check_window(window: int | None) -> int | None:
    """The window of the call: None where it hides nothing."""
    if window is None:
        return None
    if isinstance(window, bool):
        raise TypeError(f"attention: window is {window}; expected an integer.")
    check_integer("attention", "window", window)
    if window < 0:
        raise ValueError(f"attention: window is {window}; expected an integer of at least 0, or None for no window.")
    return None if window >= _FAR else window


def check_terms(
    query: Tensor, key: Tensor, bias: Tensor | None, c2p: Tensor | None, p2c: Tensor | None, buckets: Tensor | None
) -> Terms:
    """The terms of the scores as the operator takes them: bias in float32, or float64 as query; buckets in int32."""
    if bias is None and c2p is None and p2c is None and buckets is None:
        return None, None, None, None
    if bias is not None:
        check_floating("attention", "bias", bias)
        if bias.dim() != 2 or bias.shape[0] != query.shape[-2] or bias.shape[1] % 2 == 0:
            raise ValueError(
                f"attention: bias is {describe(bias)}; expected shape ({query.shape[-2]}, 2 R + 1), one row per head"
                " and a column for each distance from -R to R."
            )
        check_device("attention", "bias", bias, query.device, "query")
        bias = bias.to(torch.float64 if query.dtype == torch.float64 else torch.float32).contiguous()
    if (buckets is None) != (c2p is None and p2c is None):
        raise ValueError("attention: buckets says which of c2p and p2c a distance has; expected it with them.")
    if buckets is None:
        return bias, None, None, None
    given = [(name, x, like) for name, x, like in (("c2p", c2p, query), ("p2c", p2c, key)) if x is not None]
    width = given[0][1].shape[-1] if given[0][1].dim() else 0
    for name, x, like in given:
        check_floating("attention", name, x)
        of = "query" if name == "c2p" else "key"
        check_shape("attention", name, x, (*like.shape[:-1], width), f"like {of}, with as many buckets as the other")
        check_device("attention", name, x, query.device, "query")
    check_tensor("attention", "buckets", buckets, "a torch.Tensor of integers")
    if buckets.dtype not in (torch.int32, torch.int64) or buckets.dim() != 1 or buckets.shape[0] % 2 == 0:
        raise ValueError(
            f"attention: buckets is {describe(buckets)}; expected int32 or int64 (2 R + 1,), the bucket of each"
            " distance from -R to R."
        )
    check_device("attention", "buckets", buckets, query.device, "query")
    if buckets.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(x) for x in buckets.aminmax())
        if low < 0 or high >= width:
            raise ValueError(f"attention: buckets holds {low} to {high}; expected 0 to {width - 1}, the last of c2p.")
    dtype = query.dtype
    c2p, p2c = (None if x is None else x.to(dtype) for x in (c2p, p2c))
    return bias, c2p, p2c, buckets.to(torch.int32).contiguous()


def check_layout(
    name: str, x: Tensor, cu_seqlens: Tensor | None, dense: str, packed: str, dense_dimensions: int
) -> None:
    if cu_seqlens is None:
        if x.dim() != dense_dimensions:
            hint = f"; {packed} goes with cu_seqlens" if x.dim() == dense_dimensions - 1 else ""
            raise ValueError(f"attention: {name} is {describe(x)}; expected {dense}{hint}.")
    elif x.dim() != dense_dimensions - 1:
        raise ValueError(f"attention: {name} is {describe(x)}; expected {packed}, because cu_seqlens was given.")


def check_chosen(query: Tensor, cu_seqlens: Tensor | None, cu_seqlens_q: Tensor, positions_q: Tensor) -> None:
    assert cu_seqlens is not None
    check_tensor("attention", "cu_seqlens", cu_seqlens, "a torch.Tensor of integers")
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("positions_q", positions_q)):
        check_tensor("attention", name, x, "a torch.Tensor of integers")
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"attention: {name} is {describe(x)}; expected int32 or int64.")
        check_device("attention", name, x, query.device, "query")
    check_shape("attention", "cu_seqlens_q", cu_seqlens_q, cu_seqlens.shape, "like cu_seqlens")
    check_shape("attention", "positions_q", positions_q, query.shape[:1], "one per query")
