"""Self-attention of a layer that runs as it stands (compiled, checkpointed, with a module in it that is not known):
without a T×T tensor all the same, where the mask is one of the known patterns.

Shape legend: query, key, value (B, S, H, D), any strides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from fasttune import ops
from fasttune.ops.attention import MAX_HEAD_DIM
from fasttune.ops.packing import PackedBatch
from fasttune.patching.layers.entry import ATTENTIONS, NEUTRAL, UNREAD, attentions_wanted, layout_of_call, source_of
from fasttune.patching.layers.frozen import Unknown
from fasttune.patching.layers.patched import Patched
from fasttune.patching.layers.real_keys import over_real_keys
from fasttune.patching.marks import reading_waits, runs_fused, unusual
from fasttune.patching.padding.layout import Layout
from fasttune.patching.premises.known import stock_class, why_replaced
from fasttune.patching.promises.later import Later
from fasttune.patching.promises.tensor import PromisedRows, materialized


def layout_for_attention(
    module: Patched,
    hidden: Tensor,
    mask: Tensor | None,
    head_dim: int,
    arguments: Mapping[str, Any],
    window: int | None = None,
    *,
    described: Any = None,
    by_distance: bool = False,
    both_real: bool = False,
) -> Layout | None:
    """Who sees whom, or None where stock's attention has to run. window: the one that the mask may show; described:
    what says how the module attends, if not itself; by_distance: whether scores go by how far apart tokens are;
    both_real: the pattern of the mask, as `layout_of` has it."""
    patch = module._fasttune
    if not patch.settings.options.attention or unusual() or hidden.device.type == "meta":
        return None
    described = module if described is None else described
    implementation = described.config._attn_implementation
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    try:
        _as_shipped(module)
        if implementation not in ATTENTIONS:
            raise Unknown(f"attn_implementation={implementation!r}")
        if attentions_wanted():
            raise Unknown("attention weights were asked for")
        if head_dim > MAX_HEAD_DIM:
            raise Unknown(f"heads of {head_dim} dimensions")
        if not runs_fused("attention", kind, dtype, patch.backend):
            raise Unknown(f"no fused kernel for {str(dtype).removeprefix('torch.')} on {kind}")
        if mask is not None and torch.compiler.is_compiling():
            raise Unknown("a mask inside torch.compile")
        if mask is not None and not patch.settings.options.packing and reading_waits(hidden.device):
            raise Unknown(UNREAD)
        patterns: dict[str, Any] = {"by_distance": by_distance, "both_real": both_real}
        layout = layout_of_call(hidden, mask, described, arguments, window, **patterns)
        if implementation == "eager" and layout.blind:
            raise Unknown("queries that see no key under eager attention")
    except Unknown as why:
        patch.aside(str(why))
        return None
    patch.note()
    return layout


def _as_shipped(module: Patched) -> None:
    """Raises Unknown if the forward that fasttune's stands for is not the one that its class ships."""
    why = why_replaced(stock_class(type(module)))
    if why is not None:
        raise Unknown(why)


def self_attention(
    module: Any,
    hidden: Tensor,
    mask: Tensor | None,
    projections: tuple[Any, Any, Any],
    *,
    dropout: nn.Dropout,
    arguments: Mapping[str, Any],
    cache: Any = None,
) -> Tensor | None:
    """Of a module that calls it what BERT does (attention_head_size, scaling): (B, S, H * D), None where stock's has to
    run. projections: those of query, key and value; cache: one that holds nothing for this layer yet."""
    if hidden.dim() != 3 or 0 in hidden.shape:
        return None
    layout = layout_for_attention(module, hidden, mask, module.attention_head_size, arguments)
    if layout is None:
        return None
    heads = (-1, module.attention_head_size)
    query, key, value = (project(hidden).unflatten(-1, heads) for project in projections)
    into_cache(cache, key.transpose(1, 2), value.transpose(1, 2), getattr(module, "layer_idx", 0))
    p = dropout.p if module.training else 0.0
    out = attend(query, key, value, layout, scale=module.scaling, dropout_p=p, backend=module._fasttune.backend)
    return out.flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, **options: Any) -> Tensor:
    """(B, S, H, D): queries at padding too, over the real keys of their row. options: of `ops.attention`."""
    terms: dict[str, Any] = {"causal": layout.causal, "window": layout.window}
    packed = layout.packed
    if layout.full and packed.cu_seqlens.shape[0] - 1 == layout.shape[0]:
        return ops.attention(query, key, value, **options, **terms)
    options |= {"cu_seqlens": packed.cu_seqlens, "max_seqlen": packed.max_seqlen}
    if layout.full:
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
        return ops.attention(query, key, value, **options, **terms).unflatten(0, layout.shape)
    key, value = (ops.pack(x, packed)[0] for x in (key, value))
    out = over_real_keys(query.flatten(0, 1), torch.arange(layout.places.numel()), key, value, layout, options)
    return out.unflatten(0, layout.shape)


def keys_given(mask: Tensor | None, queries: int, keys: int) -> Tensor | None:
    """Which keys (B, K) every query of cross-attention sees, as a mask (B, 1, Q, K) says; raises Unknown."""
    if mask is None:
        return None
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] not in (1, queries) or mask.shape[3] != keys:
        raise Unknown("a mask of another kind than padded encoder states")
    visible = mask.detach()[:, 0] if mask.dtype == torch.bool else mask.detach()[:, 0] == 0
    hidden = mask.dtype == torch.bool or bool((visible | (mask[:, 0] == torch.finfo(mask.dtype).min)).all())
    if mask.requires_grad or not hidden or not bool((visible == visible[:, :1]).all()):
        raise Unknown("a mask of another kind than padded encoder states")
    real = visible[:, 0]
    return None if bool(real.all()) else real


def across(
    module: Patched,
    query: Tensor,
    states: Tensor,
    project: Callable[[Tensor], tuple[Tensor, Tensor]],
    cache: Any,
    mask: Tensor | None,
    *,
    rowwise: bool,
    scale: float,
    dropout_p: float,
    arguments: Mapping[str, Any],
) -> Tensor | None:
    """Cross-attention: query (B, Q, H, D) over encoder states (B, K, E) under a mask (B, 1, Q, K); None where stock's
    has to run. project: (..., E) to key and value (..., H, D); rowwise: whether it may be given the real rows alone.
    A cache that is empty is filled."""
    patch = module._fasttune
    implementation = module.config._attn_implementation
    if torch.compiler.is_compiling() or unusual() or 0 in query.shape or 0 in states.shape:
        return None
    try:
        _as_shipped(module)
        if implementation not in ATTENTIONS or attentions_wanted() or query.shape[-1] > MAX_HEAD_DIM:
            raise Unknown("attention weights were asked for, or another attention was chosen")
        others = {name for name, given in arguments.items() if given is not None and given is not False}
        if others - NEUTRAL:
            raise Unknown(f"{', '.join(sorted(others - NEUTRAL))} given")
        if not runs_fused("attention", query.device.type, query.dtype, patch.backend):
            raise Unknown(f"no fused kernel for {str(query.dtype).removeprefix('torch.')} on {query.device.type}")
        real = keys_given(mask, query.shape[1], states.shape[1])
        if real is not None and real.shape[0] != query.shape[0]:
            real = real.expand(query.shape[0], -1)
        if real is not None and implementation == "eager" and not bool(real.any(1).all()):
            raise Unknown("queries that see no key under eager attention")
    except Unknown as why:
        patch.aside(str(why))
        return None
    patch.note()
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p, "backend": patch.backend}
    packed = None if real is None else PackedBatch.from_mask(real)
    if packed is not None and rowwise and (cache is None or torch.is_grad_enabled()):
        key, value = _real_keys(module, states, project, real, cache)
    else:
        key, value = project(states)
        into_cross_cache(cache, key.transpose(1, 2), value.transpose(1, 2), module.layer_idx)
        if packed is None:
            return ops.attention(query, key, value, **options)
        key, value = (ops.pack(x, packed)[0] for x in (key, value))
    sequences, queries = query.shape[:2]
    out = ops.attention(
        query.flatten(0, 1),
        key,
        value,
        cu_seqlens=packed.cu_seqlens,
        max_seqlen=packed.max_seqlen,
        cu_seqlens_q=torch.arange(sequences + 1, dtype=torch.int32, device=query.device) * queries,
        positions_q=torch.arange(queries, dtype=torch.int32, device=query.device).repeat(sequences),
        **options,
    )
    return out.unflatten(0, (sequences, queries))


def _real_keys(
    module: Patched, states: Any, project: Callable[[Tensor], tuple[Tensor, Tensor]], real: Any, cache: Any
) -> tuple[Tensor, Tensor]:
    """Key and value (T, H, D) of the real rows among (B, K, E). What a cache gets is computed when somebody looks."""
    promised = PromisedRows.of(source_of(states), states.shape[:2])
    heads: list[int] = []

    def both(rows: Tensor, ids: Tensor | None) -> Tensor:
        key, value = project(rows)
        heads[:] = key.shape[-2:]
        return torch.cat((key.flatten(-2), value.flatten(-2)), -1)

    with torch.no_grad():
        width = both(torch.empty(0, states.shape[-1], dtype=states.dtype, device=states.device), None).shape[-1]
    rows = promised.mapped(both, tuple(module.parameters()), width)

    def part(number: int) -> Callable[[], Tensor]:
        return lambda: rows.materialize().chunk(2, -1)[number].unflatten(-1, heads).transpose(1, 2)

    if cache is not None:
        shape = (states.shape[0], heads[0], states.shape[1], heads[1])
        key, value = (Later.of(part(number), shape, rows.dtype, rows.device) for number in (0, 1))
        into_cross_cache(cache, key, value, module.layer_idx)
    key, value = materialized(rows[real]).chunk(2, -1)
    return key.unflatten(-1, heads), value.unflatten(-1, heads)


def fresh_cache(cache: Any, layer_idx: int | None) -> bool:
    """Whether there is nothing in a cache yet that self-attention would have to see."""
    if cache is None:
        return True
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if type(cache) is not DynamicCache or layer_idx is None:
        return False
    if layer_idx >= len(cache.layers):
        return True
    layer = cache.layers[layer_idx]
    return type(layer) is DynamicLayer and layer.get_seq_length() == 0


def into_cache(cache: Any, key: Tensor, value: Tensor, layer_idx: int) -> None:
    """key and value (B, H, S, D)."""
    if cache is not None:
        (cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache).update(key, value, layer_idx)


def fills(cache: Any, layer_idx: int | None) -> bool:
    """Whether cross-attention computes its keys and values in this call, for a cache or for none."""
    if cache is None:
        return True
    return isinstance(cache, EncoderDecoderCache) and layer_idx is not None and not cache.is_updated.get(layer_idx)


def into_cross_cache(cache: Any, key: Tensor, value: Tensor, layer_idx: int) -> None:
    """key and value (B, H, K, D) of encoder states."""
    if cache is not None:
        cache.cross_attention_cache.update(key, value, layer_idx)
        cache.is_updated[layer_idx] = True
