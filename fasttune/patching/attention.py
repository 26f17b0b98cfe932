"""The attention and mask functions that a patched model's layers call through Transformers' registries.

The mask function answers None (nothing is masked), the 2-D mask (B, S) where padding can be dropped, or what the stock
mask function builds: with a cache, packed position ids, a prefix, anything unusual. The attention function runs
`ops.attention` for the first two and stock SDPA for the rest.

Two names are registered: a model keeps `fasttune` where it had `sdpa`, and `fasttune_eager` where it had `eager`, whose
attention weights can be asked for with output_attentions; such calls take the eager path.

Shape legend: B batch, H heads, S query tokens, K key tokens, D head dim; Transformers passes query (B, H, S, D), key
and value (B, H, K, D), and expects (B, S, H, D).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, eager_mask, sdpa_mask
from transformers.utils.output_capturing import _active_collector

from fasttune import ops
from fasttune.ops.packing import PackedBatch
from fasttune.patching.rows import note_on_running_call, why_padding_is_read
from fasttune.patching.state import ModulePatch, patch_of, runs_fused

OVER_SDPA, OVER_EAGER = "fasttune", "fasttune_eager"
MAX_HEAD_DIM = 128  # beyond it the operation has no kernel
NAMES = {"sdpa": OVER_SDPA, "eager": OVER_EAGER}  # what a model had -> what it gets


def attentions_wanted() -> bool:
    """Whether the running forward collects attention weights."""
    if torch.compiler.is_compiling():
        return False
    collected = _active_collector.get()
    return bool(collected) and ("attentions" in collected or "cross_attentions" in collected)


@dataclass(frozen=True)
class Padding:
    """What the mask function learned about a 2-D mask; travels with the tensor to every layer."""

    packed: PackedBatch
    causal: bool


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """As Transformers' `sdpa_mask`, but may also return a 2-D mask (B, S), True at real tokens."""
    config = kwargs.get("config")
    eager = getattr(config, "_attn_implementation", None) == OVER_EAGER and attentions_wanted()
    causal = mask_function is causal_mask_function
    plain = (causal or mask_function is bidirectional_mask_function) and q_length == kv_length and kv_offset == 0
    if plain and local_size is None and not eager and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if attention_mask is None or bool(attention_mask.all()):
            return None
        # A decoder's bidirectional mask speaks of the encoder's tokens: its queries are not padded by it.
        of_queries = causal or not getattr(config, "is_decoder", False)
        if of_queries and attention_mask.shape == (batch_size, kv_length):
            why = why_padding_is_read(config, attention_mask, causal=causal)
            if why is None:
                tagged = attention_mask.clone()
                tagged._fasttune = Padding(PackedBatch.from_mask(tagged), causal)  # type: ignore[attr-defined]
                return tagged
            note_on_running_call("attention", f"padding kept: {why}")
    return (eager_mask if eager else sdpa_mask)(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **kwargs,
    )


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As Transformers' `sdpa_attention_forward`; attention weights only under `fasttune_eager` when asked for."""
    if module.config._attn_implementation == OVER_EAGER and attentions_wanted():
        return _eager(module)(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    patch: ModulePatch | None = patch_of(module)
    backend = patch.backend if patch else None
    why = _unsuited(module, query, key, value, attention_mask, is_causal, backend, kwargs)
    if why is None:
        causal = (is_causal if is_causal is not None else getattr(module, "is_causal", True)) and query.shape[2] > 1
        parts = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout, "backend": backend}
        return _dense_or_packed(ops.attention, parts, attention_mask, causal, options), None
    if patch is not None and why:
        patch.aside(why)
    if attention_mask is not None and attention_mask.dim() == 2:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        attention_mask = _as_4d(attention_mask, query.shape[2], causal and not is_cross_attention(module))
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def attention_of_qkv(
    module: Any, qkv: Tensor, attention_mask: Tensor | None, *, dropout: float, scaling: float
) -> Tensor | None:
    """Causal self-attention of one projection (B, S, 3, H, D), whose gradient is then written once; (B, S, H, D). None
    where the layer has to ask the registered function with query, key and value."""
    if module.config._attn_implementation not in NAMES.values():
        return None
    patch: ModulePatch = patch_of(module)
    query = qkv[:, :, 0].transpose(1, 2)
    if _unsuited(module, query, query, query, attention_mask, None, patch.backend, {}) is not None:
        return None
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout, "backend": patch.backend}
    return _dense_or_packed(ops.attention_packed_qkv, (qkv,), attention_mask, True, options)


def _dense_or_packed(
    operation: Any, parts: tuple[Tensor, ...], mask: Tensor | None, causal: bool, options: dict[str, Any]
) -> Tensor:
    """operation(*parts), parts (B, S, ...); with a mask (B, S) on the real tokens alone, zeros at padding."""
    if mask is None:
        return operation(*parts, causal=causal, **options)
    padding = getattr(mask, "_fasttune", None)  # gone if somebody copied the mask
    if padding is None:
        padding = Padding(PackedBatch.from_mask(mask), causal)
    packed: PackedBatch = padding.packed
    out = operation(
        *(ops.pack(part, packed)[0] for part in parts),
        causal=padding.causal,
        cu_seqlens=packed.cu_seqlens,
        max_seqlen=packed.max_seqlen,
        **options,
    )
    return ops.unpack(out, packed)


def _unsuited(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None,
    backend: str | None,
    kwargs: dict[str, Any],
) -> str | None:
    """None if `ops.attention` can take this call, "" if it is stock SDPA's in the ordinary run of things (decoding,
    evaluation), else a reason to report."""
    queries, keys, head_dim = query.shape[2], key.shape[2], query.shape[3]
    if not runs_fused("attention", query.device.type, query.dtype, backend):
        return f"no fused kernel for {str(query.dtype).removeprefix('torch.')} on {query.device.type}"
    if queries != keys and not torch.is_grad_enabled():
        return ""
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            return "4-D mask" if torch.is_grad_enabled() else ""
        if is_cross_attention(module):
            return "padded encoder states"
    elif queries not in (1, keys) and (is_causal or (is_causal is None and getattr(module, "is_causal", True))):
        return "causal attention over cached keys"
    if head_dim > MAX_HEAD_DIM or value.shape[3] != head_dim or key.shape[1] != query.shape[1]:
        return f"head dim {head_dim}, values of {value.shape[3]}, {query.shape[1]} heads over {key.shape[1]}"
    unusual = [name for name in ("softcap", "position_bias", "cache", "s_aux") if kwargs.get(name) is not None]
    return f"unusual arguments: {', '.join(unusual)}" if unusual else None


def is_cross_attention(module: nn.Module) -> bool:
    return bool(getattr(module, "is_cross_attention", False)) or type(module).__name__.endswith("CrossAttention")


def _as_4d(mask: Tensor, queries: int, causal: bool) -> Tensor:
    """The stock mask (B, 1, S, K) that a 2-D mask of keys stands for."""
    keys_B11K = mask.bool()[:, None, None, :]
    if not causal:
        return keys_B11K.expand(-1, -1, queries, -1)
    return keys_B11K & torch.ones(queries, mask.shape[1], dtype=torch.bool, device=mask.device).tril()


def _eager(module: nn.Module) -> Any:
    """The eager attention function of the model family the module belongs to."""
    stock = next(cls for cls in type(module).__mro__ if cls.__module__.startswith("transformers."))
    return vars(sys.modules[stock.__module__])["eager_attention_forward"]


for _name in NAMES.values():
    AttentionInterface.register(_name, attention)
    AttentionMaskInterface.register(_name, mask)
