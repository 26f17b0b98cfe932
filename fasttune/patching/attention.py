"""The attention and mask functions that a patched model's layers call through Transformers' registries.

The mask function answers None (nothing is masked), a plan (plan.py) in the shape of a 2-D mask (B, S) where padding can
be dropped or several sequences lie in a row, or what the stock mask function builds: with a cache, a prefix, anything
unusual. The attention function runs `ops.attention` for the first two and stock SDPA for the rest.

Two names are registered: a model keeps `fasttune` where it had `sdpa`, and `fasttune_eager` where it had `eager`, whose
attention weights can be asked for with output_attentions; such calls take the eager path.

Shape legend: B batch, H heads, S query tokens, K key tokens, D head dim; Transformers passes query (B, H, S, D), key
and value (B, H, K, D), and expects (B, S, H, D).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, eager_mask, sdpa_mask
from transformers.utils.output_capturing import _active_collector

from fasttune import ops
from fasttune.patching import plan as plans
from fasttune.patching.facts import Facts, facts_of, facts_of_call
from fasttune.patching.plan import Plan, plan_of
from fasttune.patching.rows import call_of, in_training, may_trim, note_on_running_call, why_padding_is_read
from fasttune.patching.stack import why_not_across
from fasttune.patching.state import ModulePatch, patch_of, reading_waits, runs_fused

OVER_SDPA, OVER_EAGER = "fasttune", "fasttune_eager"
MAX_HEAD_DIM = 128  # beyond it the operation has no kernel
NAMES = {"sdpa": OVER_SDPA, "eager": OVER_EAGER}  # what a model had -> what it gets


def attentions_wanted() -> bool:
    """Whether the running forward collects attention weights."""
    if torch.compiler.is_compiling():
        return False
    collected = _active_collector.get()
    return bool(collected) and ("attentions" in collected or "cross_attentions" in collected)


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
    """As Transformers' `sdpa_mask`, but may also return a plan (B, S)."""
    config = kwargs.get("config")
    eager = getattr(config, "_attn_implementation", None) == OVER_EAGER and attentions_wanted()
    causal = mask_function is causal_mask_function
    plain = (causal or mask_function is bidirectional_mask_function) and q_length == kv_length and kv_offset == 0
    without_looking = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}  # for ones alone
    if attention_mask is not None and not _may_read(config, attention_mask):
        kwargs |= without_looking
    elif local_size is None and not eager and not torch.compiler.is_compiling():
        planned, everything = None, True
        if attention_mask is not None:
            ours = plain and attention_mask.shape == (batch_size, kv_length) and not _of_an_encoder(config, causal)
            facts = facts_of(call_of(config) if ours else None, attention_mask)
            everything = facts.full
            if ours and not everything:
                dtype = kwargs.get("dtype", torch.float32)
                planned = _plan_of_padding(config, attention_mask, facts, dtype, causal=causal)
        elif q_length == kv_length:
            one_way = mask_function is not bidirectional_mask_function
            planned = _plan_of_sequences(config, batch_size, q_length, causal=one_way)
            _foresee(config, (batch_size, q_length), kwargs.get("device"))
        if planned is not None:
            return planned
        if plain and everything and (torch.is_grad_enabled() or in_training()):
            return None
        if not everything:
            kwargs |= without_looking
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


def _may_read(config: Any, mask: Tensor) -> bool:
    """Whether a mask's values may decide how the running call is computed. With packing=False not on a GPU: the host
    would wait for them, and the step could not be captured into a CUDA graph."""
    call = None if torch.compiler.is_compiling() else call_of(config)
    if call is None or patch_of(call.model).settings.options.packing or not reading_waits(mask.device):
        return True
    note_on_running_call("attention", "packing=False: the mask's values are not read on a GPU")
    return False


def _plan_of_sequences(config: Any, batch: int, length: int, *, causal: bool) -> Tensor | None:
    """Of sequences that the user packed into rows, which no token of another may see."""
    call = call_of(config)
    if call is None or not patch_of(call.model).settings.options.packing:
        return None
    packed = plans.packed_by_user(call.inputs, batch, length)
    return None if packed is None else plans.sequence_plan(packed, causal=causal)


def _of_an_encoder(config: Any, causal: bool) -> bool:
    """A decoder's bidirectional mask speaks of the encoder's tokens: its queries are not padded by it."""
    return not causal and bool(getattr(config, "is_decoder", False))


def _foresee(config: Any, shape: tuple[int, int], device: torch.device | None) -> None:
    """Counts the rows that the head will read, which the last layer asks for, before the device has work."""
    call = call_of(config)
    if call is not None and device is not None and patch_of(call.model).settings.options.trim and may_trim(call):
        facts_of_call(call, shape, device)


def _plan_of_padding(config: Any, mask: Tensor, facts: Facts, dtype: torch.dtype, *, causal: bool) -> Tensor | None:
    """Of a padded batch whose padding nobody reads."""
    call = call_of(config)
    why = "the model's forward was called directly" if call is None else why_padding_is_read(facts, causal=causal)
    if call is None or why is not None:
        if torch.is_grad_enabled() or in_training():
            note_on_running_call("attention", f"padding kept: {why}")
        return None
    device = mask.device.type
    why = why_padding_is_read(facts, causal=False)  # without exception: rows at padding are not there at all
    why = why or why_not_across(
        call, device, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
    )
    if why is None and not causal and call.inputs.get("encoder_hidden_states") is not None:
        why = "encoder_hidden_states given"
    if why is not None:
        note_on_running_call("packing", f"between layers: {why}")
        if not (torch.is_grad_enabled() or in_training()):
            return None
    return plans.padding_plan(mask, facts, causal=causal, across=why is None)


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
    plan = plan_of(attention_mask)
    if plan is not None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        attention_mask = _as_4d(plan, attention_mask, query.shape[2], causal and not is_cross_attention(module))
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
    """operation(*parts), parts (B, S, ...), or (1, T, ...) where hidden states are packed; with a plan sequence by
    sequence on the real tokens alone, zeros at padding."""
    plan = plan_of(mask)
    if plan is None:
        return operation(*parts, causal=causal, **options)
    packed = plan.packed
    options = {
        "causal": causal if plan.causal is None else plan.causal,
        "cu_seqlens": packed.cu_seqlens,
        "max_seqlen": packed.max_seqlen,
        **options,
    }
    if plan.across:
        return operation(*(part[0] for part in parts), **options).unsqueeze(0)
    if packed.is_full:
        return operation(*(part.flatten(0, 1) for part in parts), **options).unflatten(0, packed.shape)
    out = operation(*(ops.pack(part, packed)[0] for part in parts), **options)
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


def _as_4d(plan: Plan, mask: Tensor | None, queries: int, causal: bool) -> Tensor:
    """The stock mask (B, 1, S, K) that a plan stands for; mask is the tensor that carries it."""
    assert mask is not None
    if plan.across or queries == mask.shape[1]:
        return plans.as_4d(plan, causal=causal)
    return mask.bool()[:, None, None, :].expand(-1, -1, queries, -1)  # of an encoder's tokens


def _eager(module: nn.Module) -> Any:
    """The eager attention function of the model family the module belongs to."""
    stock = next(cls for cls in type(module).__mro__ if cls.__module__.startswith("transformers."))
    return vars(sys.modules[stock.__module__])["eager_attention_forward"]


for _name in NAMES.values():
    AttentionInterface.register(_name, attention)
    AttentionMaskInterface.register(_name, mask)
