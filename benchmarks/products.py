"""The matrix products that a piece of work cannot do without: the limit that its time is compared with.

Counted are, for each linear layer over M rows (K inputs, N outputs): x W, dy Wᵀ and xᵀ dy; for each head of attention
over T tokens of D: Q Kᵀ and P V forward, and Pᵀ dO, dO Vᵀ, dS K, dSᵀ Q backward, six in all (a kernel that recomputes
Q Kᵀ does a seventh: that is its choice, not a need). A causal mask needs (T + 1) / 2T of each. The rows of a vocabulary
projection are those with a label. Nothing is counted for the first layer's missing input gradient: embeddings train.

Each distinct product is timed through torch at exactly its shape and layout, into memory that is already there, in
every round of a race, and multiplied by how often the work needs it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Product:
    """`count` times a @ b, with a (batch, m, k) and b (batch, k, n); transposed_* tells how they lie in memory."""

    m: int
    k: int
    n: int
    count: float = 1.0
    batch: int = 0  # 0: a plain matrix product
    transposed_a: bool = False
    transposed_b: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def flops(self) -> float:
        return 2.0 * self.count * max(self.batch, 1) * self.m * self.k * self.n


def linear(
    rows: int,
    inputs: int,
    outputs: int,
    count: float = 1.0,
    *,
    conv1d: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Product]:
    """Forward, input and weight gradient; the weight lies (outputs, inputs), or (inputs, outputs) if conv1d."""
    if rows == 0:
        return []
    weight_gradient = (
        Product(inputs, rows, outputs, count, transposed_a=True, dtype=dtype)
        if conv1d
        else Product(outputs, rows, inputs, count, transposed_a=True, dtype=dtype)
    )
    return [
        Product(rows, inputs, outputs, count, transposed_b=not conv1d, dtype=dtype),
        Product(rows, outputs, inputs, count, transposed_b=conv1d, dtype=dtype),
        weight_gradient,
    ]


def attention(
    lengths: Sequence[int],
    heads: int,
    head_dim: int,
    count: float = 1.0,
    *,
    causal: bool = False,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Product]:
    """The six products of attention over sequences of these lengths, forward and backward; under a window the share of
    them that it lets through."""
    needed = []
    for length, sequences in sorted(Counter(lengths).items()):
        batch = sequences * heads
        times = count * (length + 1) / (2 * length) if causal else count
        if window is not None:
            times *= sum(min(i, window) + min(length - 1 - i, window) + 1 for i in range(length)) / length**2
        common = {"batch": batch, "dtype": dtype}
        needed += [
            Product(length, head_dim, length, 2 * times, transposed_b=True, **common),  # Q Kᵀ, dO Vᵀ
            Product(length, length, head_dim, 2 * times, **common),  # P V, dS K
            Product(length, length, head_dim, 2 * times, transposed_a=True, **common),  # Pᵀ dO, dSᵀ Q
        ]
    return needed


class ProductTimer:
    """Holds operands for every distinct product and times them all: one call is one measurement."""

    def __init__(self, products: Sequence[Product]) -> None:
        counts: dict[Product, float] = {}
        for product in products:
            shape = Product(**{**product.__dict__, "count": 1.0})
            counts[shape] = counts.get(shape, 0.0) + product.count
        self.gflop = sum(product.flops for product in products) / 1e9
        self._scratch: dict[torch.dtype, Tensor] = {}
        for product in counts:
            numel = max(product.batch, 1) * product.m * product.n
            if numel > self._scratch.get(product.dtype, torch.empty(0)).numel():
                self._scratch[product.dtype] = torch.zeros(numel, dtype=product.dtype)
        self._pool: dict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = {}
        self._timed = [(count, self._runner(product)) for product, count in counts.items()]

    def _operand(self, taken: list[Tensor], batch: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A matrix that this product does not use yet; products share theirs, to save memory."""
        shape = (batch, rows, columns) if batch else (rows, columns)
        pool = self._pool.setdefault((shape, dtype), [])
        for tensor in pool:
            if not any(tensor is other for other in taken):
                break
        else:
            tensor = torch.randn(shape).to(dtype)
            pool.append(tensor)
        taken.append(tensor)
        return tensor

    def _runner(self, product: Product) -> Callable[[], Tensor]:
        m, k, n, batch, taken = product.m, product.k, product.n, product.batch, []
        if product.transposed_a:
            a = self._operand(taken, batch, k, m, product.dtype).transpose(-1, -2)
        else:
            a = self._operand(taken, batch, m, k, product.dtype)
        if product.transposed_b:
            b = self._operand(taken, batch, n, k, product.dtype).transpose(-1, -2)
        else:
            b = self._operand(taken, batch, k, n, product.dtype)
        shape = (batch, m, n) if batch else (m, n)
        out = self._scratch[product.dtype][: math.prod(shape)].view(shape)
        multiply = torch.bmm if batch else torch.mm
        return lambda: multiply(a, b, out=out)

    def __call__(self) -> float:
        """Seconds that all the products take."""
        total = 0.0
        for count, run in self._timed:
            started = time.perf_counter()
            run()
            total += count * (time.perf_counter() - started)
        return total
