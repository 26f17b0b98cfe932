"""Philox 4x32-10 and fasttune's dropout masks in plain Python and torch: the executable form of docs/dropout.md."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
ELEMENTWISE_DOMAIN = 0
ATTENTION_DOMAIN = 1


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds of Philox 4x32 (Salmon et al. 2011) on one counter, in Python integers."""
    x0, x1, x2, x3 = counter
    key0, key1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (product1 >> 32) ^ x1 ^ key0, product1 & WORD, (product0 >> 32) ^ x3 ^ key1, product0 & WORD
        key0, key1 = (key0 + 0x9E3779B9) & WORD, (key1 + 0xBB67AE85) & WORD
    return x0, x1, x2, x3


def _multiply_wide(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low words of x * factor for words held in int64, without overflowing its 63 bits."""
    low_half, high_half = (x & 0xFFFF) * factor, (x >> 16) * factor
    middle = (low_half >> 16) + high_half
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low_half & 0xFFFF)


def philox_words(c0: Tensor, c1: Tensor, c2: Tensor, c3: int, seed: Tensor) -> Tensor:
    """The four output words of every counter, (4, ...) int64; c0, c1, c2 broadcast. seed: int64 (1,)."""
    key0, key1 = seed & WORD, (seed >> 32) & WORD
    x0, x1, x2 = torch.broadcast_tensors(c0, c1, c2)
    x3 = torch.full_like(x0, c3)
    for _ in range(10):
        high0, low0 = _multiply_wide(x0, 0xD2511F53)
        high1, low1 = _multiply_wide(x2, 0xCD9E8D57)
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & WORD, (key1 + 0xBB67AE85) & WORD
    return torch.stack((x0, x1, x2, x3))


def threshold(dropout_p: float) -> int:
    """16-bit uniforms below this drop their element."""
    return int(dropout_p * 65536.0 + 0.5)


def keep_scale(dropout_p: float) -> float:
    """What kept elements are multiplied by: the inverse of the probability that is really used."""
    dropped = threshold(dropout_p)
    return 0.0 if dropped >= 65536 else 65536 / (65536 - dropped)


def keep_mask(c1: Tensor, c2: Tensor, domain: int, columns: int, seed: Tensor, dropout_p: float) -> Tensor:
    """Bool mask (..., columns) of kept elements at coordinates (c1, c2, domain), c1 and c2 of shape (...)."""
    blocks = (columns + 127) // 128
    counters = torch.arange(blocks * 16, dtype=torch.int64, device=c1.device)
    words = philox_words(counters, c1.unsqueeze(-1), c2.unsqueeze(-1), domain, seed)  # (4, ..., blocks * 16)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=1)  # (word 4, half 2, ..., blocks * 16)
    by_block = halves.unflatten(-1, (blocks, 16)).movedim((0, 1), (-3, -2))  # (..., blocks, word, half, counter)
    return by_block.flatten(-4)[..., :columns] >= threshold(dropout_p)


def elementwise_keep_mask(rows: Tensor, columns: int, seed: Tensor, dropout_p: float) -> Tensor:
    """Mask (rows, columns) of an elementwise dropout; rows: int64 logical row numbers."""
    return keep_mask(rows & WORD, (rows >> 32) & WORD, ELEMENTWISE_DOMAIN, columns, seed, dropout_p)


def attention_keep_mask(query_rows: Tensor, batch_heads: Tensor, keys: int, seed: Tensor, dropout_p: float) -> Tensor:
    """Mask (..., keys) of attention weights; query_rows: position of the query in its sequence, negative
    before the first key; batch_heads: sequence * heads + head; both int64 and broadcast against each other."""
    query_rows, batch_heads = torch.broadcast_tensors(query_rows, batch_heads)
    return keep_mask(query_rows & WORD, batch_heads, ATTENTION_DOMAIN, keys, seed, dropout_p)
