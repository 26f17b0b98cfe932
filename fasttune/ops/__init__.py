"""Fused training operations. Each takes `backend=None` and has a `torch` reference; see docs/api.md."""

from fasttune.ops._backends import available_backends
from fasttune.ops.attention import attention, attention_packed_qkv
from fasttune.ops.bias_activation import bias_activation, bias_gelu
from fasttune.ops.cross_entropy import cross_entropy
from fasttune.ops.dropout import dropout
from fasttune.ops.embedding import embedding
from fasttune.ops.gated_activation import gated_activation
from fasttune.ops.layer_norm import dropout_add_layer_norm, layer_norm
from fasttune.ops.layer_norm_gelu import gelu_layer_norm, layer_norm_gelu
from fasttune.ops.linear_cross_entropy import linear_cross_entropy
from fasttune.ops.linear_log_prob import LinearLogProb, linear_log_prob
from fasttune.ops.linear_max import linear_max
from fasttune.ops.packing import PackedBatch, pack, unpack
from fasttune.ops.rotary import rotary

__all__ = [
    "LinearLogProb",
    "PackedBatch",
    "attention",
    "attention_packed_qkv",
    "available_backends",
    "bias_activation",
    "bias_gelu",
    "cross_entropy",
    "dropout",
    "dropout_add_layer_norm",
    "embedding",
    "gated_activation",
    "gelu_layer_norm",
    "layer_norm",
    "layer_norm_gelu",
    "linear_cross_entropy",
    "linear_log_prob",
    "linear_max",
    "pack",
    "rotary",
    "unpack",
]
