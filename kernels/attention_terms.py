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
def add_diagonals(sums, ds, ahead, least, most, reach):
    """Adds to sums (2 R + 1,), which only this program touches, what ds [queries, keys] has of each distance, from
    `least` to `most`.

    A block of distances at a time: each row is shifted until a distance is a column, and the columns are summed.
    """
    KEYS: tl.constexpr = ds.shape[1]
    if least <= -reach:
        tl.store(sums, tl.load(sums) + tl.sum(tl.where(ahead <= -reach, ds, 0.0)))
    if most >= reach:
        far = (ahead >= reach) & (ahead > -reach)
        tl.store(sums + 2 * reach, tl.load(sums + 2 * reach) + tl.sum(tl.where(far, ds, 0.0)))
    column = tl.arange(0, KEYS)
    for first in range(tl.maximum(least, 1 - reach), tl.minimum(most, reach - 1) + 1, KEYS):
        distance = first + column
        key = distance[None, :] - (ahead - column[None, :])
        inside = (key >= 0) & (key < KEYS)
        shifted = tl.where(inside, tl.gather(ds, tl.where(inside, key, 0), 1), 0.0)
        pointers, near = sums + reach + distance, distance < reach
        tl.store(pointers, tl.load(pointers, mask=near, other=0.0) + tl.sum(shifted, 0), mask=near)
        tl.debug_barrier()  # before another thread adds to them


@triton.jit
def add_buckets(sums, sums_rows, ds, ahead, least, most, row, column, before, buckets, ranks, reach):
    """Adds to sums, rows of buckets at the offsets sums_rows, which only this program touches, what ds has of each.
    least, most: distances of the tile; row, column: which are there; before: how many columns before each have its
    distance, None for none; ranks: how many distances before each have its bucket.

    Elements of one rank have a bucket each in their row, and are added at once: near distances, with a bucket each,
    take one turn, far ones as many as share a bucket. Those beyond the reach, however many, are summed before.
    """
    COLUMNS: tl.constexpr = ds.shape[1]
    if least <= -reach:
        _add_to_bucket(sums + sums_rows + tl.load(buckets), tl.where(column[None, :] & (ahead <= -reach), ds, 0.0), row)
    if most >= reach:
        far = column[None, :] & (ahead >= reach) & (ahead > -reach)
        _add_to_bucket(sums + sums_rows + tl.load(buckets + 2 * reach), tl.where(far, ds, 0.0), row)
    first, last = 2 * reach, -1
    for distance in range(tl.maximum(least, 1 - reach), tl.minimum(most, reach - 1) + 1, COLUMNS):
        near = distance + tl.arange(0, COLUMNS)
        near = tl.where(near <= tl.minimum(most, reach - 1), near, distance)
        rank = tl.load(ranks + reach + near)
        first, last = tl.minimum(first, tl.min(rank)), tl.maximum(last, tl.max(rank))
    place, turns = place_of(ahead, reach), last - first + 1
    turn = tl.load(ranks + place) - first
    if before is not None:
        turn += before[None, :] * turns
        turns *= tl.max(before) + 1
    turn = tl.where(row[:, None] & column[None, :] & (tl.abs(ahead) < reach), turn, -1)
    at = sums + (sums_rows[:, None] + tl.load(buckets + place))
    for now in range(0, turns):
        tl.store(at, tl.load(at, mask=turn == now, other=0.0) + ds, mask=turn == now)
        tl.debug_barrier()  # before another thread adds to them


@triton.jit
def _add_to_bucket(at, ds, row):
    tl.store(at, tl.load(at, mask=row, other=0.0) + tl.sum(ds, 1), mask=row)
    tl.debug_barrier()
