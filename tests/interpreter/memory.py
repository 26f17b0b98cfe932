"""Checks and counts every memory access of an interpreted kernel.

Out of bounds: an access that leaves the storage of every tensor argument raises, before it happens.
Race: programs of one launch run in no order on a GPU, so an address that one program writes must not be read or
written by another, unless both use atomics. Here they run one after another and a wrong kernel gives the right answer:
the check remembers who touched each byte.
Traffic: bytes that unmasked lanes loaded and stored, by kernel; `traffic()` collects them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
SEVERAL = 2**31 - 1  # in place of a program's number: several programs have read this byte


class KernelMemoryError(Exception):
    """A kernel touched memory that it must not touch, or that another program of the launch touches too."""


class Launch:
    """What one launch may touch, and who has touched what. Programs are numbered from 1; 0 is nobody."""

    def __init__(self, name: str = "", storages: dict[int, int] | None = None) -> None:
        spans = sorted((storages or {}).items())
        self.name = name
        self.starts = np.array([start for start, _ in spans], np.uint64)
        self.ends = np.array([start + size for start, size in spans], np.uint64)
        self.writer = [np.zeros(size, np.int32) for _, size in spans]
        self.reader = [np.zeros(size, np.int32) for _, size in spans]
        self.atomic = [np.zeros(size, bool) for _, size in spans]

    def access(self, kind: str, builder: Any, pointers: Any, mask: Any) -> None:
        """Checks one load, store or atomic; only the first byte of each element is followed."""
        addresses = np.asarray(pointers.data, np.uint64)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
        addresses = addresses.reshape(-1)
        if not addresses.size:
            return
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        _count[self.name, kind] += addresses.size * itemsize
        index = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        outside = (index < 0) | (addresses + np.uint64(itemsize) > self.ends[np.maximum(index, 0)])
        if outside.any():
            self._raise_outside(kind, builder, addresses[outside])
        x, y, z = builder.grid_idx
        size_x, size_y, _ = builder.grid_dim
        me = 1 + x + size_x * (y + size_y * z)
        for storage in np.unique(index):
            offsets = (addresses[index == storage] - self.starts[storage]).astype(np.int64)
            self._follow(kind, storage, offsets, me, builder.grid_idx)

    def _follow(self, kind: str, storage: int, offsets: np.ndarray, me: int, program: tuple[int, int, int]) -> None:
        writer, reader, atomic = self.writer[storage], self.reader[storage], self.atomic[storage]
        written = (writer[offsets] != 0) & (writer[offsets] != me)
        read = (reader[offsets] != 0) & (reader[offsets] != me)
        problem = None
        if kind == "load":
            if written.any():
                problem = "it reads what another program writes"
            reader[offsets] = np.where((reader[offsets] == 0) | (reader[offsets] == me), me, SEVERAL)
        elif kind == "store":
            if written.any():
                problem = "it writes what another program writes"
            elif read.any():
                problem = "it writes what another program reads"
            elif np.unique(offsets).size != offsets.size:
                problem = "one tl.store writes an address twice"
            writer[offsets], atomic[offsets] = me, False
        else:
            if (written & ~atomic[offsets]).any() or read.any():
                problem = "its atomic meets another program's plain access"
            writer[offsets], atomic[offsets] = me, True
        if problem is not None:
            raise KernelMemoryError(
                f"{self.name}: race in program {program}: {problem}, at byte {offsets[0]} of storage {storage}"
            )

    def _raise_outside(self, kind: str, builder: Any, addresses: np.ndarray) -> None:
        address = int(addresses[0])
        where = "with no tensor argument"
        if self.starts.size:
            near = int(np.argmin(np.abs(self.starts.astype(np.int64) - address)))
            start, end = int(self.starts[near]), int(self.ends[near])
            where = f"byte {address - start} of a storage of {end - start} bytes"
        raise KernelMemoryError(
            f"{self.name}: out-of-bounds {kind} in program {builder.grid_idx}: {addresses.size} lanes, first at {where}"
        )


_launch = Launch()
_count: Counter[tuple[str, str]] = Counter()


@contextlib.contextmanager
def traffic() -> Iterator[Counter[tuple[str, str]]]:
    """Bytes by (kernel, "load" | "store" | "atomic") of what runs inside; the counter fills as kernels run."""
    global _count
    before, _count = _count, Counter()
    try:
        yield _count
    finally:
        _count = before


def _storages(values: Any, found: dict[int, int]) -> dict[int, int]:
    for value in values:
        if isinstance(value, (tuple, list)):
            _storages(value, found)
        elif hasattr(value, "untyped_storage"):
            storage = value.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
        elif hasattr(value, "base"):  # a tensor descriptor or a reinterpreted tensor
            _storages([value.base], found)
    return found


def install() -> None:
    stock_arguments = interpreter.GridExecutor._init_args_hst
    stock_load, stock_store = Builder.create_masked_load, Builder.create_masked_store
    stock_rmw, stock_cas = Builder.create_atomic_rmw, Builder.create_atomic_cas

    def _init_args_hst(self, args_dev, kwargs):
        global _launch
        args, kwargs = stock_arguments(self, args_dev, kwargs)
        _launch = Launch(self.fn.__name__, _storages([*args, *kwargs.values()], {}))
        return args, kwargs

    def create_masked_load(self, ptrs, mask, other, *options):
        _launch.access("load", self, ptrs, mask)
        return stock_load(self, ptrs, mask, other, *options)

    def create_masked_store(self, ptrs, value, mask, *options):
        _launch.access("store", self, ptrs, mask)
        return stock_store(self, ptrs, value, mask, *options)

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):
        _launch.access("atomic", self, ptr, mask)
        return stock_rmw(self, op, ptr, val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        _launch.access("atomic", self, ptr, None)
        return stock_cas(self, ptr, cmp, val, sem, scope)

    interpreter.GridExecutor._init_args_hst = _init_args_hst
    Builder.create_masked_load, Builder.create_masked_store = create_masked_load, create_masked_store
    Builder.create_atomic_rmw, Builder.create_atomic_cas = create_atomic_rmw, create_atomic_cas
