"""Faithful bfloat16 for Triton's interpreter.

The interpreter keeps bfloat16 as raw uint16 bits. Triton 3.9 computes `+`, `*` and `tl.dot` on those bits, and its
casts from float32 truncate. Here every operation widens to float32, computes there, and rounds to nearest, ties to
even: what the hardware does for one operation. `tl.dot` into float32 does not depend on which operand is transposed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

TensorHandle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder
BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def widen(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to_bits(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits of float32 values, to nearest, ties to even; a NaN stays one."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _values(handle: Any) -> np.ndarray:
    return widen(handle.data) if handle.data.dtype == np.uint16 and is_bf16(handle) else handle.data


def _float32(handle: Any) -> Any:
    return TensorHandle(widen(handle.data), tl.float32) if is_bf16(handle) else handle


def _bf16(values: np.ndarray) -> Any:
    return TensorHandle(round_to_bits(values), tl.bfloat16)


def install() -> None:
    stock_cast, stock_float_cast = Builder.cast_impl, Builder.create_fp_to_fp
    stock_unary, stock_binary, stock_ternary = Builder.unary_op, Builder.binary_op, Builder.ternary_op
    stock_dot, stock_fma, stock_reduce = Builder.create_dot, Builder.create_fma, interpreter.ReduceOps.apply_impl

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return src if is_bf16(src) else _bf16(_values(src).astype(np.float32))
        return stock_cast(self, _float32(src), dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if dst_type.scalar == tl.bfloat16 and rounding_mode != ir.ROUNDING_MODE.RTZ:
            return cast_impl(self, src, dst_type)
        return stock_float_cast(self, src, dst_type, rounding_mode)

    def unary_op(self, arg, op):
        return _bf16(op(_values(arg))) if is_bf16(arg) else stock_unary(self, arg, op)

    def binary_op(self, lhs, rhs, op):
        if not (is_bf16(lhs) or is_bf16(rhs)) or op in BITWISE:
            return stock_binary(self, lhs, rhs, op)
        result = op(_values(lhs), _values(rhs))
        return TensorHandle(result, tl.int1) if result.dtype == bool else _bf16(result)

    def ternary_op(self, lhs, rhs, other, op):
        if is_bf16(other) and op is np.clip:  # the other ternary, select, moves bits and is right as it stands
            return _bf16(op(_values(lhs), _values(rhs), _values(other)))
        return stock_ternary(self, lhs, rhs, other, op)

    def create_fma(self, x, y, z):
        if not is_bf16(z):
            return stock_fma(self, x, y, z)
        return _bf16((_values(x).astype(np.float64) * _values(y) + _values(z)).astype(np.float32))

    def create_dot(self, a, b, d, *options):
        if d.dtype.scalar != tl.float32 or a.dtype.primitive_bitwidth == 8 or b.dtype.primitive_bitwidth == 8:
            return stock_dot(self, _float32(a), _float32(b), d, *options)
        # NumPy adds up the terms of (b^T a^T)^T in another order than those of a b, and transposed scores would differ
        # from the log-sum-exp that they belong to, as on no GPU. Rounded once, there is no order.
        product = np.matmul(_values(a).astype(np.float64), _values(b).astype(np.float64))
        return TensorHandle(product.astype(np.float32) + d.data, tl.float32)

    def apply_impl(self, inputs):
        if not all(tensor.dtype == tl.bfloat16 for tensor in inputs):
            return stock_reduce(self, inputs)
        wide = tuple(
            tl.core.tensor(_float32(tensor.handle), tl.block_type(tl.float32, list(tensor.handle.data.shape)))
            for tensor in inputs
        )
        result = stock_reduce(self, wide)
        return tuple(map(_narrow, result)) if isinstance(result, (list, tuple)) else _narrow(result)

    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    Builder.unary_op, Builder.binary_op, Builder.ternary_op = unary_op, binary_op, ternary_op
    Builder.create_dot, Builder.create_fma = create_dot, create_fma
    interpreter.ReduceOps.apply_impl = apply_impl


def _narrow(tensor: Any) -> Any:
    if tensor.dtype != tl.float32:
        return tensor
    kind = tl.block_type(tl.bfloat16, list(tensor.shape)) if tensor.type.is_block() else tl.bfloat16
    return tl.core.tensor(_bf16(tensor.handle.data), kind)
