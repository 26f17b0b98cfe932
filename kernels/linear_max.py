"""out[n, v] = max over the tokens t of sequence n of x_t . w_v + b_v, and its gradients, without the (T, V) logits.

Forward: a program is a sequence and BLOCK_V classes. It walks over the sequence's tokens by BLOCK_T, multiplies them
with its rows of w, and keeps the maximum and its token per class. 2 T V C operations; memory sees x and w once, for
programs that run at once share their classes, so that rows of w come from L2, as x (T C) does.

Backward. With t(n, v) the first token that attains the maximum and g = dL/dout, only that token's logit moves out:
    dw_v = sum_n g[n, v] x_t(n, v),   db_v = sum_n g[n, v],   dx_t = sum over (n, v) with t(n, v) = t of g[n, v] w_v.
dw: a program gathers the rows of x for BLOCK_V classes, sequence by sequence, and adds: N V C multiply-adds and as
many elements of x at most, from L2, where a product with the dense gradient takes T V C; a g of 0 reads nothing.
dx: the terms of a token lie anywhere in the vocabulary; finding them takes a sort, or atomics, which add in any order.
So it is dense, but in registers alone: a program is BLOCK_T tokens of one sequence and BLOCK_C columns. For BLOCK_V
classes after the other it makes the tile P[t, v] = g where t(n, v) = t, else 0, and multiplies it with their rows of w:
2 T V C operations of tensor cores at most, as many as forward; a tile that holds nothing is passed over.
All sums are in float32, in the order of v or n: the same bits each time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttune.kernels import launch
from fasttune.kernels.attention_rows import extent, find_tile
from fasttune.kernels.launch import tile_of

BLOCK_T = 64  # tokens of a tile
BLOCK_V_DW, BLOCK_C_DW = 16, 128

NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["sequences"])
def linear_max_forward_kernel(
    x,
    weight,
    bias,
    offsets,
    out,
    token,
    sequences,
    classes,
    features,
    x_row,
    weight_row,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    sequence = tl.program_id(0) % sequences
    v = tl.program_id(0) // sequences * BLOCK_V + tl.arange(0, BLOCK_V)
    exists = v < classes
    begin, length = extent(offsets, sequence, 0)
    end = begin + length
    if bias is not None:
        shift = tl.load(bias + v, mask=exists, other=0.0).to(tl.float32)
    best = tl.full([BLOCK_V], float("-inf"), tl.float32)
    best_token = tl.full([BLOCK_V], -1, tl.int32)
    w_rows = weight + v.to(tl.int64)[None, :] * weight_row
    for first in range(begin, end, BLOCK_T):
        row = first + tl.arange(0, BLOCK_T)
        inside = row < end
        x_rows = x + row.to(tl.int64)[:, None] * x_row
        acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for k in range(0, features, BLOCK_K):
            column = k + tl.arange(0, BLOCK_K)
            known = column < features
            x_tile = tl.load(x_rows + column[None, :], mask=inside[:, None] & known[None, :], other=0.0)
            w_tile = tl.load(w_rows + column[:, None], mask=exists[None, :] & known[:, None], other=0.0)
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        if bias is not None:
            acc += shift[None, :]
        value = tl.where(inside[:, None], acc, float("-inf"))
        nan = value != value
        top = tl.max(tl.where(nan, float("inf"), value), 0)
        some_nan = tl.max(nan.to(tl.int32), 0) > 0
        attains = tl.where(some_nan[None, :], nan, value == top[None, :]) & inside[:, None]
        first_token = tl.min(tl.where(attains, row[:, None], NO_TOKEN), 0)
        higher = ((top > best) | some_nan) & (best == best) | (best_token < 0)
        best = tl.where(higher, tl.where(some_nan, float("nan"), top), best)
        best_token = tl.where(higher, first_token, best_token)
    at = sequence.to(tl.int64) * classes + v
    tl.store(out + at, best.to(out.dtype.element_ty), mask=exists)
    tl.store(token + at, best_token, mask=exists)


@triton.jit(do_not_specialize=["sequences"])
def linear_max_dweight_kernel(
    dout,
    token,
    x,
    dweight,
    sequences,
    classes,
    features,
    x_row,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block, tile = tile_of(features, BLOCK_C)
    v, column = block * BLOCK_V + tl.arange(0, BLOCK_V), tile * BLOCK_C + tl.arange(0, BLOCK_C)
    exists, known = v < classes, column < features
    acc = tl.zeros([BLOCK_V, BLOCK_C], tl.float32)
    for sequence in range(0, sequences):
        at = tl.cast(sequence, tl.int64) * classes + v
        row = tl.load(token + at, mask=exists, other=-1)
        g = tl.load(dout + at, mask=exists & (row >= 0), other=0.0).to(tl.float32)
        wanted = (g != 0.0)[:, None] & known[None, :]
        source = tl.load(x + row.to(tl.int64)[:, None] * x_row + column[None, :], mask=wanted, other=0.0)
        acc += g[:, None] * source.to(tl.float32)
    mask = exists[:, None] & known[None, :]
    tl.store(
        dweight + v.to(tl.int64)[:, None] * features + column[None, :], acc.to(dweight.dtype.element_ty), mask=mask
    )


@triton.jit(do_not_specialize=["sequences"])
def linear_max_dinput_kernel(
    dout,
    token,
    weight,
    dinput,
    offsets,
    sequences,
    classes,
    features,
    weight_row,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    sequence, tile = find_tile(offsets, sequences, BLOCK_T)
    begin, length = extent(offsets, sequence, 0)
    if tile * BLOCK_T >= length:
        return
    first = begin + tile * BLOCK_T
    row, column = first + tl.arange(0, BLOCK_T), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = column < features
    acc = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for start in range(0, classes, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        at = sequence.to(tl.int64) * classes + v
        winner = tl.load(token + at, mask=v < classes, other=-1)
        mine = (winner >= first) & (winner < first + BLOCK_T)
        g = tl.load(dout + at, mask=mine, other=0.0)
        mine = mine & (g != 0.0)
        if tl.max(mine.to(tl.int32), 0) > 0:
            w_tile = tl.load(
                weight + v.to(tl.int64)[:, None] * weight_row + column[None, :],
                mask=mine[:, None] & known[None, :],
                other=0.0,
            )
            p = tl.where(row[:, None] == winner[None, :], g[None, :], 0.0).to(w_tile.dtype)
            acc = tl.dot(p, w_tile, acc, input_precision=PRECISION)
    mask = (row < begin + length)[:, None] & known[None, :]
    tl.store(
        dinput + row.to(tl.int64)[:, None] * features + column[None, :], acc.to(dinput.dtype.element_ty), mask=mask
    )


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"  # tf32 concerns float32 alone


def _stages(dtype: torch.dtype) -> int:
    return 3 if dtype.itemsize == 2 and not launch.target().startswith("gfx") else 2


def linear_max(input: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """fasttune::linear_max: (out (N, V), token (N, V) int32)."""
    x, weight, cu_seqlens = _unit_stride(input), _unit_stride(weight.to(input.dtype)), cu_seqlens.contiguous()
    sequences, (classes, features) = cu_seqlens.shape[0] - 1, weight.shape
    out = torch.empty((sequences, classes), dtype=x.dtype, device=x.device)
    token = torch.empty((sequences, classes), dtype=torch.int32, device=x.device)
    if out.numel():
        block_v, block_k = (128, 64) if x.dtype.itemsize == 2 else (64, 32)  # what float32 has registers for
        linear_max_forward_kernel[(triton.cdiv(classes, block_v) * sequences,)](
            *(x, weight, None if bias is None else bias.contiguous(), cu_seqlens, out, token),
            *(sequences, classes, features, x.stride(0), weight.stride(0)),
            BLOCK_T=BLOCK_T,
            BLOCK_V=block_v,
            BLOCK_K=block_k,
            PRECISION=_precision(x.dtype),
            num_warps=launch.warps(8),
            num_stages=_stages(x.dtype),
        )
    return out, token


def linear_max_backward(
    dout: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    token: Tensor,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """fasttune::linear_max_backward: gradients of input, weight and bias, an empty tensor where not needed."""
    (sequences, classes), (rows, features), device = token.shape, input.shape, input.device
    dout, token, cu_seqlens = dout.contiguous(), token.contiguous(), cu_seqlens.contiguous()
    nothing = torch.empty(0, dtype=torch.float32, device=device)
    dinput = torch.empty(input.shape, dtype=input.dtype, device=device) if needs[0] else nothing
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=device) if needs[1] else nothing
    dbias = nothing
    if dinput.numel():
        w = _unit_stride(weight.to(input.dtype))
        block_v, block_c, warps = (64, 128, 4) if input.dtype.itemsize == 2 else (32, 64, 8)
        linear_max_dinput_kernel[(rows // BLOCK_T + sequences, triton.cdiv(features, block_c))](
            *(dout, token, w, dinput, cu_seqlens, sequences, classes, features, w.stride(0)),
            BLOCK_T=BLOCK_T,
            BLOCK_V=block_v,
            BLOCK_C=block_c,
            PRECISION=_precision(input.dtype),
            num_warps=launch.warps(warps),
            num_stages=_stages(w.dtype),
        )
    if dweight.numel():
        x = _unit_stride(input)
        linear_max_dweight_kernel[(triton.cdiv(classes, BLOCK_V_DW) * triton.cdiv(features, BLOCK_C_DW),)](
            *(dout, token, x, dweight, sequences, classes, features, x.stride(0)),
            BLOCK_V=BLOCK_V_DW,
            BLOCK_C=BLOCK_C_DW,
            num_warps=launch.warps(4),
        )
    if needs[2] and bias is not None:
        dbias = torch.where(token >= 0, dout, 0.0).sum(0, dtype=torch.float32).to(bias.dtype)
    return dinput, dweight, dbias
