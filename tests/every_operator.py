"""Every differentiable operator of fasttune.ops in one small call, for what all of them must do alike."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttune import ops
from fasttune.ops import _random
from fasttune.ops.tied import tied_views

IDS = torch.tensor([[1, 0, 3], [2, 2, 1]])
LABELS = torch.tensor([1, -100, 4, 0])
CU = torch.tensor([0, 3, 5])
CHOSEN = {"cu_seqlens": CU, "cu_seqlens_q": torch.tensor([0, 1, 3]), "positions_q": torch.tensor([1, 0, 4])}
TABLES = torch.linspace(-1, 1, 48).view(2, 3, 8)  # no cosines and sines: both halves of a row count
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


@dataclass(frozen=True)
class Call:
    """function(*tensors, backend=...) of differentiable tensors of these shapes."""

    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    linear: bool = False  # its gradient does not depend on its arguments

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator).to(dtype) for shape in self.shapes]


def _seeded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With the same dropout in every call."""

    def call(*tensors: Tensor, **options: object) -> Tensor:
        with _random.repeating([torch.tensor([5], device=tensors[0].device)]):
            return function(*tensors, **options)

    return call


def _prenorm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, **options: object) -> Tensor:
    out, total = ops.dropout_add_layer_norm(x, residual, weight, bias, dropout_p=0.3, prenorm=True, **options)
    return out + total


def _there_and_back(x: Tensor, backend: str | None = None) -> Tensor:
    packed, batch = ops.pack(x, MASK.to(x.device))
    return ops.unpack(packed.sin(), batch)


def _tied(weight: Tensor, backend: str | None = None) -> Tensor:
    lookup, head = tied_views(weight)
    return ops.embedding(IDS.to(weight.device), lookup, sparse_grad=True, backend=backend) @ head.T


def _log_probs(x: Tensor, weight: Tensor, bias: Tensor, **options: object) -> Tensor:
    found = ops.linear_log_prob(x, weight, LABELS.to(x.device), linear_bias=bias, scale=0.5, **options)
    return found.log_prob + found.logsumexp + found.entropy + found.mean_logit


def _rotary(x: Tensor, **options: object) -> Tensor:
    positions = torch.tensor([0, 1, 2, 0, 1], device=x.device)
    return ops.rotary(x, *(table.to(x.device) for table in TABLES), row_ids=positions, rotated=2, **options)


def _disentangled(query: Tensor, key: Tensor, value: Tensor, c2p: Tensor, p2c: Tensor, **options: object) -> Tensor:
    buckets = torch.tensor([0, 1, 2, 3, 3], dtype=torch.int32, device=query.device)
    return ops.attention(query, key, value, c2p=c2p, p2c=p2c, buckets=buckets, **options)


_ROWS, _PARAMETER, _HEADS = (4, 20), (20,), (2, 3, 2, 16)

CALLS = {
    "attention": Call(ops.attention, (_HEADS,) * 3),
    "attention, causal, dropout": Call(
        _seeded(lambda *x, **o: ops.attention(*x, causal=True, dropout_p=0.3, **o)), (_HEADS,) * 3
    ),
    "attention, window": Call(lambda *x, **o: ops.attention(*x, window=1, **o), (_HEADS,) * 3),
    "attention, packed": Call(
        lambda *x, **o: ops.attention(*x, cu_seqlens=CU.to(x[0].device), max_seqlen=3, **o), ((5, 2, 16),) * 3
    ),
    "attention, chosen queries": Call(
        lambda *x, **o: ops.attention(*x, causal=True, **{k: v.to(x[0].device) for k, v in CHOSEN.items()}, **o),
        ((3, 2, 16), (5, 2, 16), (5, 2, 16)),
    ),
    "attention, bias": Call(lambda *x, **o: ops.attention(*x[:3], bias=x[3], **o), (*(_HEADS,) * 3, (2, 5))),
    "attention, disentangled": Call(_disentangled, (_HEADS,) * 3 + ((2, 3, 2, 4),) * 2),
    "attention_packed_qkv": Call(ops.attention_packed_qkv, ((2, 3, 3, 2, 16),)),
    "layer_norm": Call(ops.layer_norm, (_ROWS, _PARAMETER, _PARAMETER)),
    "dropout_add_layer_norm": Call(_seeded(ops.dropout_add_layer_norm), (_ROWS, _ROWS, _PARAMETER, _PARAMETER)),
    "dropout_add_layer_norm, prenorm": Call(_seeded(_prenorm), (_ROWS, _ROWS, _PARAMETER, _PARAMETER)),
    "layer_norm_gelu": Call(ops.layer_norm_gelu, (_ROWS, _PARAMETER, _PARAMETER)),
    "gelu_layer_norm": Call(ops.gelu_layer_norm, (_ROWS, _PARAMETER, _PARAMETER)),
    "bias_gelu": Call(ops.bias_gelu, (_ROWS, _PARAMETER)),
    "bias_activation": Call(lambda *x, **o: ops.bias_activation(*x, activation="silu", **o), (_ROWS, _PARAMETER)),
    "gated_activation": Call(lambda a, bias, **o: ops.gated_activation(a, bias=bias, **o), (_ROWS, _PARAMETER)),
    "gated_activation, two tensors": Call(ops.gated_activation, (_ROWS, _ROWS)),
    "dropout": Call(_seeded(ops.dropout), (_ROWS,), linear=True),
    "cross_entropy": Call(lambda x, **o: ops.cross_entropy(x, LABELS.to(x.device), **o), (_ROWS,)),
    "cross_entropy, none": Call(
        lambda x, **o: ops.cross_entropy(x, LABELS.to(x.device), reduction="none", **o), (_ROWS,)
    ),
    "linear_cross_entropy": Call(
        lambda x, w, b, **o: ops.linear_cross_entropy(x, w, LABELS.to(x.device), linear_bias=b, **o),
        (_ROWS, (7, 20), (7,)),
    ),
    "linear_cross_entropy, none": Call(
        lambda x, w, b, **o: ops.linear_cross_entropy(x, w, LABELS.to(x.device), linear_bias=b, reduction="none", **o),
        (_ROWS, (7, 20), (7,)),
    ),
    "linear_log_prob": Call(_log_probs, (_ROWS, (7, 20), (7,))),
    "linear_max": Call(
        lambda x, w, b, **o: ops.linear_max(x, w, CU.to(x.device), linear_bias=b, **o), ((5, 20), (7, 20), (7,))
    ),
    "embedding": Call(lambda w, **o: ops.embedding(IDS.to(w.device), w, **o), ((5, 16),), linear=True),
    "embedding, sparse": Call(
        lambda w, **o: ops.embedding(IDS.to(w.device), w, sparse_grad=True, **o), ((5, 16),), linear=True
    ),
    "rotary": Call(_rotary, ((5, 3, 2, 16),), linear=True),
    "rotary, sequences": Call(
        lambda x, **o: ops.rotary(x, *(table.to(x.device) for table in TABLES), **o), ((2, 3, 2, 10),), linear=True
    ),
    "pack and unpack": Call(_there_and_back, ((2, 3, 8),)),
    "tied_views": Call(_tied, ((5, 16),)),
}
