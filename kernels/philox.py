"""The shared dropout generator (docs/dropout.md) on a GPU: Philox 4x32-10, the same bits as C++ and the reference.

Sixteen counters of four words give 128 uniforms of 16 bits for 128 consecutive columns:
column = 128 * block + 16 * (2 * word + half) + counter % 16. A thread that evaluates a counter therefore holds eight
columns that lie 16 apart. The eight decisions are packed into one byte, and the byte is broadcast along the eight: the
change of register layout costs one byte for eight elements, and each element pays a shift and a test.

About 90 integer operations a counter, so 11 an element, plus 3 for packing and unpacking.
"""

import triton
import triton.language as tl

ELEMENTWISE = tl.constexpr(0)
ATTENTION = tl.constexpr(1)


@triton.jit
def drop_bits(seed, counter, c1, c2, threshold, DOMAIN: tl.constexpr):
    """Bit k of the result is set where column 128 * (counter // 16) + 16 * k + counter % 16 is dropped.

    seed: int64 scalar; counter, c1, c2: integer blocks that broadcast against each other, the coordinates of
    docs/dropout.md; threshold: 16-bit uniforms below it drop their element.
    """
    w0, w1, w2, w3 = tl.philox(
        seed, counter.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), tl.full([1, 1], DOMAIN, tl.uint32)
    )
    limit = threshold.to(tl.uint32)
    bits = ((w0 & 0xFFFF) < limit).to(tl.int32)
    bits |= ((w0 >> 16) < limit).to(tl.int32) << 1
    bits |= ((w1 & 0xFFFF) < limit).to(tl.int32) << 2
    bits |= ((w1 >> 16) < limit).to(tl.int32) << 3
    bits |= ((w2 & 0xFFFF) < limit).to(tl.int32) << 4
    bits |= ((w2 >> 16) < limit).to(tl.int32) << 5
    bits |= ((w3 & 0xFFFF) < limit).to(tl.int32) << 6
    bits |= ((w3 >> 16) < limit).to(tl.int32) << 7
    return bits


@triton.jit
def dropped_elements(seed, rows, first_column, threshold, COLUMNS: tl.constexpr):
    """[rows, COLUMNS] booleans, true where dropped; rows: int64 logical numbers; first_column and COLUMNS multiples
    of 128."""
    ROWS: tl.constexpr = rows.shape[0]
    counter = (first_column // 8 + tl.arange(0, COLUMNS // 8))[None, :]
    bits = drop_bits(seed, counter, rows[:, None], (rows >> 32)[:, None], threshold, ELEMENTWISE)
    bits = tl.reshape(bits, [ROWS, COLUMNS // 128, 1, 16]) >> tl.arange(0, 8)[None, None, :, None]
    return tl.reshape(bits & 1, [ROWS, COLUMNS]) != 0


@triton.jit
def attention_drop_bits(seed, query, head, first_key, threshold):
    """Bits [queries, 16] of the 128 keys from first_key on, a multiple of 128. query: positions in their sequence;
    head: sequence * heads + head."""
    counter = (first_key // 8 + tl.arange(0, 16))[None, :]
    return drop_bits(seed, counter, query[:, None], tl.full([1, 1], 0, tl.int32) + head, threshold, ATTENTION)


@triton.jit
def dropped_weights(bits, FIRST: tl.constexpr, KEYS: tl.constexpr):
    """[queries, KEYS] booleans of the keys FIRST .. FIRST + KEYS of the 128 of `bits`; both multiples of 16."""
    QUERIES: tl.constexpr = bits.shape[0]
    each = bits[:, None, :] >> (FIRST // 16 + tl.arange(0, KEYS // 16))[None, :, None]
    return tl.reshape(each & 1, [QUERIES, KEYS]) != 0


@triton.jit
def dropped_weights_transposed(seed, query, head, first_key, threshold, FIRST: tl.constexpr, KEYS: tl.constexpr):
    """[KEYS, queries] booleans of the keys first_key + FIRST .., first_key a multiple of 128."""
    QUERIES: tl.constexpr = query.shape[0]
    counter = (first_key // 8 + tl.arange(0, 16))[:, None]
    bits = drop_bits(seed, counter, query[None, :], tl.full([1, 1], 0, tl.int32) + head, threshold, ATTENTION)
    each = bits[None, :, :] >> (FIRST // 16 + tl.arange(0, KEYS // 16))[:, None, None]
    return tl.reshape(each & 1, [KEYS, QUERIES]) != 0
