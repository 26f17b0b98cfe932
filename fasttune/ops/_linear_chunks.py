"""What the operations behind a linear layer share on a CPU: chunks of rows, whose logits take turns in one buffer.

Rows that do not count are dropped first. The rest goes through in chunks: logits = x W^T, a row kernel reads them and,
where gradients are asked for, turns them into their own gradient in place; two more products give the chunk's input
gradient and add to the weight gradient, which adds up in float32, as the bias gradient does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fasttune.ops import _cpp

# Shape legend: N rows, of which M count; C input features; V classes; n rows of a chunk.
# input, dinput (N, C); weight, dweight (V, C); bias, dbias (V,); kept (M,); a chunk's logits (n, V).

# One chunk of logits, with the partial sums of the bias gradient, stays below this; the other scratch takes a few MB.
CHUNK_BYTES = 50 * 2**20
# A matrix product is as fast with this many rows as with all of them, and a smaller chunk stays closer to the caches.
ENOUGH_ROWS, ENOUGH_BYTES = 256, 16 * 2**20
# Weights in another dtype than the products' are converted a block of classes at a time.
WEIGHT_BLOCK_BYTES = 8 * 2**20
# float32 logits are computed so many classes at a time: the vendor's product of 256 rows with a whole vocabulary ran at
# 63 GFLOP/s, in such blocks at 110 (two threads, AVX2, 50257 x 768; 448 to 768 classes are alike, 2048 already slow).
LOGITS_BLOCK_CLASSES = 512


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the matrix products for inputs of `dtype`.

    bfloat16 where the processor multiplies it natively. Elsewhere float32, of which bfloat16 and float16 are subsets:
    without native support torch's products took 3 to 10 times as long as in float32 (AVX-512 without bf16).
    """
    if dtype == torch.bfloat16 and _native_bfloat16():
        return torch.bfloat16
    return torch.float32


def _native_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def chunk_rows(rows: int, classes: int, item_bytes: float) -> int:
    """Rows per chunk, so that chunks are equal and fit the budget."""
    row_bytes = max(1, classes) * item_bytes
    most = max(1, int(min(CHUNK_BYTES, max(ENOUGH_BYTES, ENOUGH_ROWS * row_bytes)) / row_bytes))
    chunks = -(-rows // most)
    return max(1, -(-rows // max(chunks, 1)))


def bias_group() -> int:
    return int(_cpp.library.bias_group)


def weight_blocks(weight: Tensor, dtype: torch.dtype, most: int) -> Iterator[tuple[slice, Tensor]]:
    """(classes, weight of these classes in `dtype`) of `most` classes at a time, fewer where they are converted."""
    classes, features = weight.shape
    convert = weight.dtype != dtype
    if convert:
        most = min(most, max(1, WEIGHT_BLOCK_BYTES // max(1, features * dtype.itemsize)))
    scratch = torch.empty((min(most, classes), features), dtype=dtype) if convert else weight
    for begin in range(0, classes, most):
        block = weight[begin : begin + most]
        yield slice(begin, begin + block.shape[0]), scratch[: block.shape[0]].copy_(block) if convert else block


def _add_weight_gradient(dweight: Tensor, dlogits: Tensor, x: Tensor, first: bool) -> None:
    """dweight (float32) += dlogits.T @ x, or = for the first chunk, which saves clearing it."""
    if dlogits.dtype == torch.float32:
        if first:
            torch.mm(dlogits.t(), x, out=dweight)
        else:
            torch.addmm(dweight, dlogits.t(), x, out=dweight)
        return
    size = max(1, WEIGHT_BLOCK_BYTES // max(1, x.shape[1] * x.dtype.itemsize))
    for begin in range(0, dweight.shape[0], size):
        product, block = torch.mm(dlogits[:, begin : begin + size].t(), x), dweight[begin : begin + size]
        if first:
            block.copy_(product)
        else:
            block.add_(product)


def rows_that_count(target: Tensor, ignore_index: int) -> Tensor | None:
    """The numbers of the rows whose label, int64, is not ignore_index; None if they all count."""
    rows = target.shape[0]
    if _cpp.library.label_weight_sum(target.data_ptr(), rows, 0, ignore_index) == rows:
        return None
    return (target != ignore_index).nonzero().squeeze(1)


def run_chunks(
    input: Tensor,
    weight: Tensor,
    kept: Tensor | None,
    run_rows: Callable[[slice | Tensor, Tensor, Tensor | None], None],
    *,
    bias_sums: bool,
    dinput: Tensor | None = None,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
) -> None:
    """Calls run_rows(rows, logits, partial) chunk by chunk and fills the gradients that are there.

    kept: the rows that count, None for all. The others get gradient 0 and no product.
    run_rows: gets the rows of `input` as an index, their logits without the bias, contiguous in the products' dtype,
        and for dbias a buffer of kBiasGroup's partial sums; it leaves the logits' gradient in their place.
    bias_sums: whether chunks leave room for `partial`, so that calls which agree in it agree in their chunks, and so in
        the logits to the last bit.
    """
    rows, classes = input.shape[0] if kept is None else kept.shape[0], weight.shape[0]
    if dinput is not None and kept is not None:
        dinput.zero_()
    for result in (dweight, dbias):
        if result is not None and (rows == 0 or result is dbias):
            result.zero_()
    dtype = product_dtype(input.dtype)
    if dtype == torch.bfloat16 and weight.dtype != dtype:
        weight = weight.to(dtype)  # as autocast does; sums over blocks of classes would be rounded to bfloat16
    most = chunk_rows(rows, classes, dtype.itemsize + (4 / bias_group() if bias_sums else 0.0))
    logits_block = LOGITS_BLOCK_CLASSES if dtype == torch.float32 else max(classes, 1)
    buffer = _cpp.empty_large((most, classes), dtype)
    groups = -(-most // bias_group())
    partial = None if dbias is None else torch.empty((groups, classes), dtype=torch.float32)
    for begin in range(0, rows, most):
        n = min(most, rows - begin)
        select: slice | Tensor = slice(begin, begin + n) if kept is None else kept[begin : begin + n]
        x, logits = input[select].to(dtype), buffer[:n]
        for block, block_weight in weight_blocks(weight, dtype, logits_block):
            torch.mm(x, block_weight.t(), out=logits[:, block])
        run_rows(select, logits, partial)
        if dinput is not None:
            straight = kept is None and dinput.dtype == dtype
            dx = dinput[select] if straight else torch.empty((n, input.shape[1]), dtype=dtype)
            for block, block_weight in weight_blocks(weight, dtype, max(classes, 1)):
                if block.start == 0:
                    torch.mm(logits[:, block], block_weight, out=dx)
                else:
                    torch.addmm(dx, logits[:, block], block_weight, out=dx)
            if not straight:
                dinput[select] = dx.to(dinput.dtype)
        if dweight is not None:
            _add_weight_gradient(dweight, logits, x, begin == 0)
        if dbias is not None and partial is not None:
            _cpp.library.sum_rows(partial.data_ptr(), dbias.data_ptr(), -(-n // bias_group()), classes)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a gradient waits for its upstream factor in: that factor may be what keeps float16 from underflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def empty_gradients(
    input: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
) -> list[Tensor | None]:
    """What run_chunks fills, None where nobody asks: dinput, dweight, dbias."""
    return [
        torch.empty(input.shape, dtype=gradient_dtype(input.dtype)) if needs[0] else None,
        _cpp.empty_large(weight.shape, torch.float32) if needs[1] else None,
        torch.empty(weight.shape[:1], dtype=torch.float32) if needs[2] else None,
    ]
