"""Drop-in modules over fasttune.ops: constructor arguments and state_dict keys of the torch.nn module they replace."""

from fasttune.nn.attention import CausalSelfAttention, SelfAttention
from fasttune.nn.cross_entropy import CrossEntropyLoss, LinearCrossEntropyLoss
from fasttune.nn.gelu import BiasGELU, LayerNormGELU, LayerNormMLP
from fasttune.nn.layer_norm import DropoutAddLayerNorm, LayerNorm

__all__ = [
    "BiasGELU",
    "CausalSelfAttention",
    "CrossEntropyLoss",
    "DropoutAddLayerNorm",
    "LayerNorm",
    "LayerNormGELU",
    "LayerNormMLP",
    "LinearCrossEntropyLoss",
    "SelfAttention",
]
