"""Terms of the scores that go by the distance of key and query: what they add, and their gradients in a tile.

`ahead` is a tile of distances, key minus query's position. Those beyond R, the `reach` of a table, are as R; bias
and buckets have an R each.
"""

import triton
import triton.language as tl

from fasttune.kernels.attention_rows import LOG2E


@triton.jit
def rows_of(row_stride, rows, ROWS: tl.constexpr):
    """Where a tile's rows begin, from its first one on; those behind the `rows` that there are, at the last."""
    return tl.minimum(tl.arange(0, ROWS), rows - 1) * row_stride


@triton.jit
def place_of(ahead, reach):
    return tl.minimum(tl.maximum(ahead, -reach), reach) + reach


@triton.jit
def scores_of(products, ahead, scale, bias, bias_reach, c2p, c2p_rows, p2c, p2c_rows, buckets, buckets_reach):
    """Scores to base 2 of a tile of products. scale: times log₂ e; c2p, p2c: at the tile's first query and key, with
    the offsets of its rows, that broadcast."""
    s = products
    if buckets is not None:
        bucket = tl.load(buckets + place_of(ahead, buckets_reach))
        if c2p is not None:
            s += tl.load(c2p + (c2p_rows + bucket)).to(tl.float32)
        if p2c is not None:
            s += tl.load(p2c + (p2c_rows + bucket)).to(tl.float32)
    s *= scale
    if bias is not None:
        s += tl.load(bias + place_of(ahead, bias_reach)) * LOG2E
    return s


@triton.jit
def add_diagonals(sums, ds, position, lowest, highest, first_key, reach):
    """Adds to sums (2 R + 1,), which only this program touches, what ds [queries, keys] has of each distance.
    position: of each query, from `lowest` to `highest`.

    A block of distances at a time: each row is shifted until a distance is a column, and the columns are summed.
    """
    KEYS: tl.constexpr = ds.shape[1]
    ahead = first_key + tl.arange(0, KEYS)[None, :] - position[:, None]
    least, most = first_key - highest, first_key + (KEYS - 1) - lowest
    if least <= -reach:
        tl.store(sums, tl.load(sums) + tl.sum(tl.where(ahead <= -reach, ds, 0.0)))
    if most >= reach:
        far = (ahead >= reach) & (ahead > -reach)
        tl.store(sums + 2 * reach, tl.load(sums + 2 * reach) + tl.sum(tl.where(far, ds, 0.0)))
    for first in range(tl.maximum(least, 1 - reach), tl.minimum(most, reach - 1) + 1, KEYS):
        distance = first + tl.arange(0, KEYS)
        key = position[:, None] + distance[None, :] - first_key
        inside = (key >= 0) & (key < KEYS)
        shifted = tl.where(inside, tl.gather(ds, tl.where(inside, key, 0), 1), 0.0)
        pointers, near = sums + reach + distance, distance < reach
        tl.store(pointers, tl.load(pointers, mask=near, other=0.0) + tl.sum(shifted, 0), mask=near)
        tl.debug_barrier()  # before another thread adds to them


@triton.jit
def add_buckets(sums, sums_rows, ds, ahead, row, column, before, buckets, ranks, reach):
    """Adds to sums, rows of buckets at the offsets sums_rows, which only this program touches, what ds has of each.
    row, column: which are there; before: how many columns before each have its distance, None for none; ranks: how
    many distances before each have its bucket.

    Elements of one rank have a bucket each in their row, and are added at once: near distances, with a bucket each,
    take one turn, far ones as many as share a bucket. Those beyond the reach, however many, are summed before.
    """
    there = row[:, None] & column[None, :]
    place = place_of(ahead, reach)
    low = there & (ahead <= -reach)
    high = there & (ahead >= reach) & (ahead > -reach)
    if tl.max(low.to(tl.int32)) > 0:
        at = sums + sums_rows[:, None] + tl.load(buckets)
        total = tl.sum(tl.where(low, ds, 0.0), 1)[:, None]
        tl.store(at, tl.load(at, mask=row[:, None], other=0.0) + total, mask=row[:, None])
        tl.debug_barrier()  # before another thread adds to them
    if tl.max(high.to(tl.int32)) > 0:
        at = sums + sums_rows[:, None] + tl.load(buckets + 2 * reach)
        total = tl.sum(tl.where(high, ds, 0.0), 1)[:, None]
        tl.store(at, tl.load(at, mask=row[:, None], other=0.0) + total, mask=row[:, None])
        tl.debug_barrier()
    near = there & (tl.abs(ahead) < reach)
    turn = tl.load(ranks + place)
    first, last = tl.min(tl.where(near, turn, 2 * reach)), tl.max(tl.where(near, turn, -1))
    turn = turn - first
    if before is not None:
        turn += before[None, :] * (last - first + 1)
    turn = tl.where(near, turn, -1)
    at = sums + (sums_rows[:, None] + tl.load(buckets + place))
    for now in range(0, tl.max(turn) + 1):
        tl.store(at, tl.load(at, mask=turn == now, other=0.0) + ds, mask=turn == now)
        tl.debug_barrier()
