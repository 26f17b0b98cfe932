"""A linear layer and the maximum over the tokens of each sequence, in one operation that never holds the logits.

Classes go by in blocks: one small product with a block of rows, from which the kernel takes each sequence's maxima on
and remembers the token of each. Backward needs these tokens alone: each (sequence, class) has a gradient for one token,
so the products of backward are sums over N V rows where those of a dense gradient go over T V numbers.

Source: the pooling is that of SPLADE, Formal et al. 2021 (arXiv:2109.10086); log1p(relu(x)) never falls, so that it may
follow the maximum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _backends, _cpp, _triton
from fasttune.ops._attention_checks import check_offsets, check_offsets_tensor
from fasttune.ops._checks import autocasts, check_device, check_floating, check_shape, describe
from fasttune.ops._linear_chunks import LOGITS_BLOCK_CLASSES, product_dtype, weight_blocks
from fasttune.ops._operator import Operator
from fasttune.ops._reference.linear_max import linear_max as linear_max_reference
from fasttune.ops.cross_entropy import as_float32

# Shape legend: T rows (tokens) of N sequences, C input features, V classes.
# input, dinput (T, C); weight, dweight (V, C); bias, dbias (V,); cu_seqlens (N + 1,); out, dout (N, V); token (N, V)
# int32, the row of the maximum, -1 for a sequence without tokens.

# Logits of so many rows and LOGITS_BLOCK_CLASSES classes stay in the caches between the product and the kernel (2 MB),
# and a product is as fast with so many rows as with all.
BLOCK_ROWS = 1024

_LAST_ROW = 2**31 - 1  # tokens are int32


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _cpp_forward(input: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    rows, sequences, classes = input.shape[0], cu_seqlens.shape[0] - 1, weight.shape[0]
    lengths = check_offsets(cu_seqlens, rows, None, operation="linear_max")
    dtype = product_dtype(input.dtype)
    x, bias, offsets = input.to(dtype), as_float32(bias), cu_seqlens.to(torch.int64).contiguous()
    out = torch.empty((sequences, classes), dtype=input.dtype)
    token = torch.empty((sequences, classes), dtype=torch.int32)
    width = min(LOGITS_BLOCK_CLASSES, classes)
    buffer = torch.empty((min(BLOCK_ROWS, rows), width), dtype=dtype)
    rounded = out.dtype != torch.float32
    scratch = torch.empty((sequences, width), dtype=torch.float32) if rounded else out
    if 0 in lengths:
        scratch.fill_(-torch.inf)
        token.fill_(-1)
    for block, block_weight in weight_blocks(weight, dtype, LOGITS_BLOCK_CLASSES):
        best = scratch[:, : block_weight.shape[0]] if rounded else out[:, block]
        for begin in range(0, rows, BLOCK_ROWS):
            part = x[begin : begin + BLOCK_ROWS]
            logits = buffer[: part.shape[0], : block_weight.shape[0]]
            torch.mm(part, block_weight.t(), out=logits)
            _cpp.library.linear_max(
                *(_cpp.DTYPE_CODES[dtype], sequences, *logits.shape, begin, logits.data_ptr(), width),
                *(_cpp.address(None if bias is None else bias[block]), offsets.data_ptr(), best.data_ptr()),
                *(best.stride(0), token[:, block].data_ptr(), classes),
            )
        if rounded:
            out[:, block] = best
    return out, token


def _fake_forward(input: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    shape = (cu_seqlens.shape[0] - 1, weight.shape[0])
    return input.new_empty(shape), input.new_empty(shape, dtype=torch.int32)


def _cpp_backward(
    dout: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    token: Tensor,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (sequences, classes), (rows, features) = token.shape, input.shape
    dout, x, weight = dout.to(torch.float32).contiguous(), _unit_stride(input), _unit_stride(weight)
    offsets, token = cu_seqlens.to(torch.int64).contiguous(), token.contiguous()
    dinput = torch.zeros(input.shape, dtype=torch.float32) if needs_input else None
    dweight = _cpp.empty_large(weight.shape, weight.dtype) if needs_weight else None
    dbias = torch.empty(classes, dtype=torch.float32) if needs_bias else None
    _cpp.library.linear_max_gradient(
        *(_cpp.DTYPE_CODES[x.dtype], _cpp.DTYPE_CODES[weight.dtype], sequences, rows, classes, features),
        *(offsets.data_ptr(), token.data_ptr(), dout.data_ptr(), x.data_ptr(), x.stride(0)),
        *(weight.data_ptr(), weight.stride(0), _cpp.address(dinput), _cpp.address(dweight), _cpp.address(dbias)),
    )
    first, second, third = (
        torch.empty(0) if gradient is None or like is None else gradient.to(like.dtype)
        for gradient, like in ((dinput, input), (dweight, weight), (dbias, bias))
    )
    return first, second, third


def _fake_backward(
    dout: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    token: Tensor,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (
        torch.empty(like.shape, dtype=like.dtype, device=like.device)
        if needed and like is not None
        else input.new_empty(0, dtype=torch.float32)
        for needed, like in ((needs_input, input), (needs_weight, weight), (needs_bias, bias))
    )
    return first, second, third


def _setup_context(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*args[:4], outputs[1])
    ctx.backend = args[4]


def _backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad[:3]
    gradients = _linear_max_backward(dout, *ctx.saved_tensors, *needed, ctx.backend)
    return *(gradient if need else None for gradient, need in zip(gradients, needed, strict=True)), None


_linear_max_backward = Operator(
    "linear_max_backward",
    "(Tensor dout, Tensor input, Tensor weight, Tensor? bias, Tensor cu_seqlens, Tensor token, bool needs_input,"
    " bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)",
    {"cpp": _cpp_backward, "triton": _triton.lazy("linear_max", "linear_max_backward")},
    _fake_backward,
    public=3,
)
_linear_max = Operator(
    "linear_max",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor cu_seqlens) -> (Tensor, Tensor)",
    {"cpp": _cpp_forward, "triton": _triton.lazy("linear_max", "linear_max")},
    _fake_forward,
    setup_context=_setup_context,
    backward=_backward,
)
_backends.declare("linear_max", *_linear_max.implementations)


def linear_max(
    input: Tensor,
    linear_weight: Tensor,
    cu_seqlens: Tensor,
    *,
    linear_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The maximum of linear(input, linear_weight, linear_bias) over each sequence's tokens, the logits never in memory.

    input: (T, C), the tokens of N sequences one after the other, float32, bfloat16 or float16 (float64 on the torch
        backend), any strides; under autocast cast as linear would.
    linear_weight: (V, C), linear_bias: (V,); in the input's dtype or float32.
    cu_seqlens: int32 or int64 (N + 1,), first row of each sequence and T at the end: 0, ..., T. Sequences may be empty.
    backend: "cpp", "triton", "torch" or None to choose.

    Returns (N, V) in the input's dtype, under autocast in autocast's. NaN among a sequence's logits gives NaN. Of equal
    maxima the first token gets the gradient, as of torch.max(dim). A sequence without tokens is -inf and passes no
    gradient. Activations that never fall, such as SPLADE's log1p(relu(x)), may follow instead of going before.
    On the C++ and Triton backends logits of 16-bit inputs are compared before they are rounded to 16 bits (but for the
    C++ library's where the processor multiplies bfloat16 natively), and a gradient of 0 costs no product on a CPU.
    Gradients add up in float32, and do not depend on the number of threads.

    Raises TypeError and ValueError for arguments that do not fit together, before anything is computed, and
    RuntimeError for a backend that cannot run here.
    """
    _check(input, linear_weight, cu_seqlens, linear_bias)
    device = input.device
    chosen = _backends.choose("linear_max", input, backend)
    if chosen != "cpp" and cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        check_offsets(cu_seqlens, input.shape[0], None, operation="linear_max")
    if autocasts(device) and input.dtype != torch.float64:
        input = input.to(torch.get_autocast_dtype(device.type))
    if chosen == "torch":
        return linear_max_reference(input, linear_weight, linear_bias, cu_seqlens)
    return _linear_max(input, linear_weight, linear_bias, cu_seqlens, chosen)


def _check(input: Tensor, linear_weight: Tensor, cu_seqlens: Tensor, linear_bias: Tensor | None) -> None:
    name = "linear_max"
    check_floating(name, "input", input)
    check_floating(name, "linear_weight", linear_weight)
    if input.dim() != 2 or linear_weight.dim() != 2 or linear_weight.shape[1] != input.shape[1]:
        raise ValueError(
            f"{name}: input is {describe(input)} and linear_weight is {describe(linear_weight)};"
            " expected shapes (T, C) and (V, C)."
        )
    device, classes = input.device, linear_weight.shape[0]
    check_device(name, "linear_weight", linear_weight, device, "input")
    if linear_bias is not None:
        check_floating(name, "linear_bias", linear_bias)
        check_shape(name, "linear_bias", linear_bias, (classes,), "one per class")
        check_device(name, "linear_bias", linear_bias, device, "input")
    for what, parameter in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if parameter is not None and parameter.dtype != input.dtype and parameter.dtype != torch.float32:
            if autocasts(device):
                continue
            raise TypeError(f"{name}: {what} is {describe(parameter)}; expected {input.dtype} like input, or float32.")
    check_offsets_tensor(name, cu_seqlens, device, "input")
    if input.shape[0] > _LAST_ROW:
        raise ValueError(f"{name}: input is {describe(input)}; expected less than 2 ** 31 rows.")
