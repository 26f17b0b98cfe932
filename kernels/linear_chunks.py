"""Chunks of rows of logits behind a linear layer on a GPU: products by torch, everything between them in a kernel.

Chunk by chunk: logits = x Wᵀ into one buffer, whose rows are padded to whole vectors, whatever the vocabulary. A row
kernel reads them and, where gradients are needed, leaves their gradient G in their place; then dx = G W and dW += Gᵀ x.
Nothing is read back to the host: rows that do not count pass through the products with G = 0.

Bytes of a chunk of n rows beside the products and the row kernel: dW twice in float32. dW is the reason to take few,
large chunks: n = CHUNK_BYTES / row, about 2600 rows of 50257 logits in 16 bits.
Sums over rows: dW in float32 across chunks, each chunk's product rounded once; dbias from G in float32.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CHUNK_BYTES = 256 * 2**20
ALIGNMENT = 64  # elements to which a row of the buffer is padded: whole cache lines in 16 bits


def chunk_rows(rows: int, row_bytes: int) -> int:
    """Rows per chunk, so that chunks are equal and fit the budget."""
    chunks = -(-rows * row_bytes // CHUNK_BYTES)
    return max(1, -(-rows // max(1, chunks)))


def run_chunks(
    input: Tensor,
    weight: Tensor,
    run_rows: Callable[[tuple[int, int, int], Tensor], None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Calls run_rows(part, logits) for each chunk: part as Tensor.narrow takes it for these rows, logits (n, V) without
    a bias and with unit stride along the classes. Returns the gradients of input, in its dtype, of weight and bias in
    float32, None where not needed."""
    rows, (classes, features), dtype, device = input.shape[0], weight.shape, input.dtype, input.device
    weight = weight.to(dtype)
    dinput = torch.empty((rows, features), dtype=dtype, device=device) if needs[0] else None
    dweight = torch.zeros((classes, features), dtype=torch.float32, device=device) if needs[1] and not rows else None
    dbias = torch.zeros(classes, dtype=torch.float32, device=device) if needs[2] else None
    padded = -(-classes // ALIGNMENT) * ALIGNMENT
    most = chunk_rows(rows, padded * dtype.itemsize)
    buffer = torch.empty((most, padded), dtype=dtype, device=device).narrow(1, 0, classes)
    for begin in range(0, rows, most):
        part = (0, begin, min(most, rows - begin))
        x, logits = input.narrow(*part), buffer.narrow(0, 0, part[2])
        torch.mm(x, weight.t(), out=logits)
        run_rows(part, logits)
        if dinput is not None:
            torch.mm(logits, weight, out=dinput.narrow(*part))
        if needs[1]:
            product = torch.mm(logits.t(), x)
            dweight = product.float() if dweight is None else dweight.add_(product)
        if dbias is not None:
            dbias += logits.sum(0, dtype=torch.float32)
    return [dinput, dweight, dbias]


def narrowed(x: Tensor | None, part: tuple[int, int, int]) -> Tensor | None:
    return None if x is None else x.narrow(*part)


def times(gradients: list[Tensor | None], factor: float | Tensor) -> list[Tensor | None]:
    """In float32: what float16 could not hold before the products."""
    return [None if gradient is None else gradient.float().mul_(factor) for gradient in gradients]


def results(gradients: list[Tensor | None], dtypes: list[torch.dtype | None], device: torch.device) -> list[Tensor]:
    """Each gradient in its dtype, an empty tensor where there is none."""
    return [
        torch.empty(0, dtype=torch.float32, device=device) if gradient is None else gradient.to(dtype)
        for gradient, dtype in zip(gradients, dtypes, strict=True)
    ]
