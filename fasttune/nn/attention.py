"""Self-attention layers: projections by the vendor's matrix product, attention by ops.attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasttune import ops
from fasttune.ops._random import check_probability

# Shape legend: B batch, S sequence, E embed_dim = H heads * D head_dim, T tokens of a packed batch, N sequences.


class SelfAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention (same arguments, state_dict and results) whose self-attention runs the fused kernel.

    The kernel runs when query, key and value are one tensor, need_weights=False and the mask is none, causal
    (is_causal=True, as for the stock module a promise that attn_mask says the same) or a bool key_padding_mask. This is
    how nn.TransformerEncoderLayer calls it, so `layer.self_attn` may be replaced. Everything else (weights wanted,
    cross-attention, other masks, add_bias_kv, add_zero_attn, kdim, vdim) runs the stock implementation.

    Two differences, both at padding: padded positions are never computed, so their output is 0 instead of a value
    without meaning, and a sequence of padding alone gives 0 instead of NaN. `attn(x)` means `attn(x, x, x)`.

    Shapes: query (B, S, E) with batch_first=True, else (S, B, E), or (S, E) unbatched; key_padding_mask bool (B, S) or
    (S,), True at padding. Returns (output like query, None), or the stock module's weights as the second.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if need_weights is None:  # attn(x) has no use for weights, attn(x, x, x) returns them like the stock module
            need_weights = key is not None
        key, value = query if key is None else key, query if value is None else value
        one_tensor = key is query and value is query
        causal_or_none = attn_mask is None or is_causal
        padding_is_bool = key_padding_mask is None or key_padding_mask.dtype == torch.bool
        plain = self.in_proj_weight is not None and self.bias_k is None and not self.add_zero_attn
        if need_weights or not (one_tensor and causal_or_none and padding_is_bool and plain) or query.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        _check_embed_dim("SelfAttention", query, self.embed_dim)
        if key_padding_mask is not None:
            return self._unpadded(query, key_padding_mask, is_causal), None
        return self._fused(query, is_causal), None

    def _fused(self, x: Tensor, causal: bool, **packed: Any) -> Tensor:
        """Attention of x (B, S, E), (S, B, E), (S, E), or of packed tokens (T, E)."""
        qkv = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))
        if x.dim() == 3 and not self.batch_first:
            qkv = qkv.transpose(0, 1)  # a view: the kernel takes any strides
        if x.dim() == 2 and not packed:
            qkv = qkv.unsqueeze(0)
        dropout_p = self.dropout if self.training else 0.0
        out = ops.attention_packed_qkv(qkv, causal=causal, dropout_p=dropout_p, **packed).flatten(-2)
        if x.dim() == 3 and not self.batch_first:
            out = out.transpose(0, 1)
        if x.dim() == 2 and not packed:
            out = out.squeeze(0)
        return self.out_proj(out)

    def _unpadded(self, x: Tensor, padding: Tensor, causal: bool) -> Tensor:
        """Attention over the real tokens alone. Dropping keys that nobody may see changes no real token's output."""
        by_batch = x.dim() == 3 and not self.batch_first
        x_BSE = x.transpose(0, 1) if by_batch else x if x.dim() == 3 else x.unsqueeze(0)
        real_BS = ~(padding if x.dim() == 3 else padding.unsqueeze(0))
        if real_BS.shape != x_BSE.shape[:2]:
            raise ValueError(
                f"SelfAttention: key_padding_mask has shape {tuple(padding.shape)}; expected {tuple(x_BSE.shape[:2])},"
                " one bool per token of query."
            )
        x_TE, batch = ops.pack(x_BSE, real_BS)
        out_TE = self._fused(x_TE, causal, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
        out_BSE = ops.unpack(out_TE, batch)
        return out_BSE.transpose(0, 1) if by_batch else out_BSE if x.dim() == 3 else out_BSE.squeeze(0)


class CausalSelfAttention(nn.Module):
    """Causal self-attention of a GPT: c_proj(attention(c_attn(x))), with dropout on the weights and on the output.

    torch.nn has no such module. Parameters are c_attn.{weight,bias} (3E, E) and c_proj.{weight,bias} (E, E), both
    nn.Linear, the layout that most GPT implementations written from scratch use. The queries, keys and values are read
    from c_attn's output where they lie.

    embed_dim: E, a multiple of num_heads. dropout: probability for attention weights; resid_dropout: for the output;
    both act in training mode alone, by the shared generator.

    Shapes: x (B, S, E), or packed (T, E) with cu_seqlens int32 (N + 1,), the first token of each sequence and T at the
    end, and max_seqlen, the longest length. Output like x.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        resid_dropout: float = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(
                f"CausalSelfAttention: embed_dim is {embed_dim} and num_heads {num_heads}; expected embed_dim to be a"
                " positive multiple of num_heads."
            )
        check_probability("CausalSelfAttention", dropout)
        check_probability("CausalSelfAttention", resid_dropout)
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.dropout, self.resid_dropout = dropout, resid_dropout
        self.c_attn = nn.Linear(embed_dim, 3 * embed_dim, bias=bias, device=device, dtype=dtype)
        self.c_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        _check_embed_dim("CausalSelfAttention", x, self.embed_dim)
        qkv = self.c_attn(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        dropout_p, resid_dropout_p = (self.dropout, self.resid_dropout) if self.training else (0.0, 0.0)
        out = ops.attention_packed_qkv(
            qkv, causal=True, dropout_p=dropout_p, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
        )
        return ops.dropout(self.c_proj(out.flatten(-2)), dropout_p=resid_dropout_p)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, dropout={self.dropout}, resid_dropout={self.resid_dropout}"


def _check_embed_dim(module: str, x: Tensor, embed_dim: int) -> None:
    if x.dim() not in (2, 3) or x.shape[-1] != embed_dim:
        raise ValueError(
            f"{module}: the input has shape {tuple(x.shape)}; expected 2 or 3 dimensions, the last of size {embed_dim}."
        )
