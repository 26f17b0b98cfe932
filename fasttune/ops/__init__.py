"""Fused training operations. Each takes `backend=None` and has a `torch` reference; see docs/api.md."""

from fasttune.ops._backends import available_backends
from fasttune.ops.attention import attention, attention_packed_qkv
from fasttune.ops.dropout import dropout
from fasttune.ops.packing import PackedBatch, pack, unpack

__all__ = [
    "PackedBatch",
    "attention",
    "attention_packed_qkv",
    "available_backends",
    "dropout",
    "pack",
    "unpack",
]
