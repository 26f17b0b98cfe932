"""Terms of the scores that go by the distance of key and query: what they add, and their gradients in a tile.

`ahead` is a tile of distances, key minus query's position. Those beyond R, the `furthest` of a table, are as R; bias
and buckets have an R each.
"""

import triton
import triton.language as tl

from fasttune.kernels.attention_rows import LOG2E


@triton.jit
def rows_of(x, first, row_stride, last, ROWS: tl.constexpr):
    """Pointers at the rows of a head from `first` on; behind `last`, at that one."""
    return x + tl.minimum(first + tl.arange(0, ROWS), last).to(tl.int64) * row_stride


@triton.jit
def place_of(ahead, furthest):
    return tl.minimum(tl.maximum(ahead, -furthest), furthest) + furthest


@triton.jit
def scores_of(products, ahead, scale, bias, bias_furthest, c2p, p2c, buckets, buckets_furthest):
    """Scores to base 2 of a tile of products. scale: times log₂ e; c2p, p2c: pointers at the rows of queries and keys,
    that broadcast."""
    s = products
    if buckets is not None:
        bucket = tl.load(buckets + place_of(ahead, buckets_furthest))
        if c2p is not None:
            s += tl.load(c2p + bucket).to(tl.float32)
        if p2c is not None:
            s += tl.load(p2c + bucket).to(tl.float32)
    s *= scale
    if bias is not None:
        s += tl.load(bias + place_of(ahead, bias_furthest)) * LOG2E
    return s


@triton.jit
def add_diagonals(sums, ds, position, lowest, highest, first_key, furthest):
    """Adds to sums (2 R + 1,), which only this program touches, what ds [queries, keys] has of each distance.
    position: of each query, from `lowest` to `highest`.

    A block of distances at a time: each row is shifted until a distance is a column, and the columns are summed.
    """
    KEYS: tl.constexpr = ds.shape[1]
    ahead = first_key + tl.arange(0, KEYS)[None, :] - position[:, None]
    least, most = first_key - highest, first_key + (KEYS - 1) - lowest
    if least <= -furthest:
        tl.store(sums, tl.load(sums) + tl.sum(tl.where(ahead <= -furthest, ds, 0.0)))
    if most >= furthest:
        far = (ahead >= furthest) & (ahead > -furthest)
        tl.store(sums + 2 * furthest, tl.load(sums + 2 * furthest) + tl.sum(tl.where(far, ds, 0.0)))
    for first in range(tl.maximum(least, 1 - furthest), tl.minimum(most, furthest - 1) + 1, KEYS):
        distance = first + tl.arange(0, KEYS)
        key = position[:, None] + distance[None, :] - first_key
        inside = (key >= 0) & (key < KEYS)
        shifted = tl.where(inside, tl.gather(ds, tl.where(inside, key, 0), 1), 0.0)
        pointers, near = sums + furthest + distance, distance < furthest
        tl.store(pointers, tl.load(pointers, mask=near, other=0.0) + tl.sum(shifted, 0), mask=near)
        tl.debug_barrier()  # before another thread adds to them
