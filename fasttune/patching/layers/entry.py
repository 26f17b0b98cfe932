"""A layer is called: may it hand out a promise of its output, or does it run as it stands?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.utils.output_capturing import _active_collector

from fasttune.ops._backends import why_not
from fasttune.ops._random import repeating
from fasttune.ops.attention import MAX_HEAD_DIM
from fasttune.ops.packing import PackedBatch
from fasttune.patching.layers.frozen import Unknown
from fasttune.patching.layers.layer_rows import Frozen, LayerRows
from fasttune.patching.layers.patched import Patched
from fasttune.patching.marks import environment_backend, reading_waits, runs_fused, unusual
from fasttune.patching.padding.layout import Layout, layout_of
from fasttune.patching.premises.known import is_sharded
from fasttune.patching.promises import trl
from fasttune.patching.promises.source import RowSource, TensorRows
from fasttune.patching.promises.tensor import PromisedRows, materialized

PACKING, TRIM, LAYERS = "packing", "trim", "layers"  # what the report counts
UNREAD = "packing=False: the mask's values are not read on a GPU"
ATTENTIONS = ("sdpa", "eager")  # the functions whose results ours are

# How layers attend whose code is their own and asks no config.
EAGER = SimpleNamespace(is_causal=False, config=SimpleNamespace(_attn_implementation="eager"))

# Arguments that layers pass on and that change nothing about attention.
NEUTRAL = frozenset(
    ("use_cache", "position_ids", "num_items_in_batch", "output_hidden_states", "return_dict", "cache_position")
)
_OFFSETS = frozenset(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"))


def attentions_wanted() -> bool:
    """Whether the running forward collects attention weights."""
    if torch.compiler.is_compiling():
        return False
    collected = _active_collector.get()
    return bool(collected) and ("attentions" in collected or "cross_attentions" in collected)


def promise(
    layer: Patched,
    freeze: Callable[[Layout], Frozen],
    hidden: Any,
    mask: Any,
    *,
    attention: Any,
    heads: int,
    head_dim: int,
    arguments: Mapping[str, Any],
    window: int | None = None,
    by_distance: bool = False,
    both_real: bool = False,
) -> PromisedRows | None:
    """The layer's output (B, S, E) as promised rows; None where it has to run as it stands.

    freeze: captures the layer for a layout, or raises Unknown. hidden (B, S, E); mask: of its self-attention.
    attention: the module that knows the config and whether it is causal. arguments: what else the layer was called
    with. window: how far its tokens see, if the mask says so too. by_distance: whether its scores go by how far apart
    tokens are. both_real: the pattern of the mask, as `layout_of` has it.
    """
    settings = layer._fasttune.settings
    options = settings.options
    if not (options.packing or options.trim) or not options.attention:
        return None
    if torch.compiler.is_compiling() or unusual() or torch._C._len_torch_dispatch_stack() > 0:
        return None
    if not isinstance(hidden, Tensor) or hidden.dim() != 3 or 0 in hidden.shape or hidden.device.type == "meta":
        return None
    if isinstance(mask, PromisedRows):
        mask = mask.materialize()
    try:
        if mask is not None and not options.packing and reading_waits(hidden.device):
            raise Unknown(UNREAD)
        patterns: dict[str, Any] = {"by_distance": by_distance, "both_real": both_real}
        layout = layout_of_call(hidden, mask, attention, arguments, window, **patterns)
        if not layout.full and not options.packing:
            return None
        _check(layer, hidden, attention, head_dim, layout)
        source = source_of(hidden)
        frozen = freeze(layout)
    except Unknown as why:
        for what in (PACKING, TRIM, LAYERS):
            settings.aside(what, str(why))
        return None
    trl.recognise()
    at_once = bool(torch._C._autograd._top_saved_tensors_default_hooks(True))  # a checkpoint's, say
    rows = LayerRows(frozen, source, layout, _dtype(frozen, hidden, heads * head_dim))
    promised = PromisedRows.of(rows, layout.shape)
    if at_once or not options.trim:
        rows.now()
    settings.note(LAYERS)
    if not layout.full:
        settings.note(PACKING)
    if at_once:
        settings.aside(TRIM, "activations are saved in another way (checkpointing)")
    rows.on_few, rows.on_all = lambda: settings.note(TRIM), settings.read
    return promised


def source_of(hidden: Tensor) -> RowSource:
    """The rows of a layer's input (B, S, E)."""
    if isinstance(hidden, PromisedRows):
        state = hidden.state
        if hidden.untouched() and state.everything and state.dtype == state.source.dtype:
            state.note("lent")
            return state.source
        hidden = hidden.materialize()
    source = TensorRows(hidden)
    source.tied = getattr(hidden, "_fasttune_tied", None)
    return source


def layout_of_call(
    hidden: Tensor,
    mask: Any,
    attention: Any,
    arguments: Mapping[str, Any],
    window: int | None = None,
    *,
    by_distance: bool = False,
    both_real: bool = False,
) -> Layout:
    """Who sees whom in this call; raises Unknown. by_distance: whether packed tokens have to be as far apart as their
    columns. both_real: as `layout_of` has it."""
    given = {name for name, value in arguments.items() if value is not None and value is not False}
    unusual_ones = given - NEUTRAL - _OFFSETS - {"is_causal"}
    if unusual_ones:
        raise Unknown(f"{', '.join(sorted(unusual_ones))} given")
    causal = bool(getattr(attention, "is_causal", True))
    if arguments.get("is_causal") is not None:  # what stock's attention goes by where there is no mask
        if attention.config._attn_implementation != "sdpa" or mask is not None:
            raise Unknown("is_causal given")
        causal = bool(arguments["is_causal"])
    shape = (hidden.shape[0], hidden.shape[1])
    if given & _OFFSETS and mask is None:
        return _by_offsets(arguments, shape, causal)
    layout = layout_of(mask, shape, hidden.device, causal=causal, window=window, both_real=both_real)
    if layout is None:
        raise Unknown("a mask of another kind than padding or sequences side by side")
    if by_distance and not layout.side_by_side:
        raise Unknown("scores by distance, and real tokens of a row that do not stand side by side")
    if mask is None and causal and attention.config._attn_implementation == "eager":
        return layout_of(None, shape, hidden.device, causal=False)  # type: ignore[return-value]
    return layout


def _by_offsets(arguments: Mapping[str, Any], shape: tuple[int, int], causal: bool) -> Layout:
    """Sequences side by side in one row, by explicit offsets (N + 1,)."""
    offsets, keys = arguments.get("cu_seq_lens_q"), arguments.get("cu_seq_lens_k")
    if not isinstance(offsets, Tensor) or shape[0] != 1 or offsets.dim() != 1 or offsets.numel() < 2:
        raise Unknown("cu_seq_lens_q that do not describe one row")
    numbers = offsets.tolist()
    if keys is not None and not torch.equal(keys, offsets):
        raise Unknown("cu_seq_lens_k other than cu_seq_lens_q")
    if numbers[0] != 0 or numbers[-1] != shape[1] or any(b < a for a, b in pairwise(numbers)):
        raise Unknown("cu_seq_lens_q that do not run from 0 to the last token")
    longest = max(b - a for a, b in pairwise(numbers))
    ids = torch.arange(shape[1], device=offsets.device)
    return Layout(PackedBatch(ids, offsets.to(torch.int32), longest, shape), causal)


def mask_for_stock(hidden: Tensor, mask: Any, attention: Any, arguments: Mapping[str, Any]) -> Any:
    """The mask that a layer which runs as it stands is handed: explicit offsets of sequences side by side count there
    too, as a mask (1, 1, S, S) in the form that its attention takes."""
    given = any(arguments.get(name) is not None for name in _OFFSETS)
    if mask is not None or not given or not isinstance(hidden, Tensor) or hidden.dim() != 3:
        return mask
    try:
        layout = _by_offsets(arguments, (hidden.shape[0], hidden.shape[1]), bool(getattr(attention, "is_causal", True)))
    except Unknown:
        return mask
    tokens = torch.arange(layout.total, device=hidden.device)
    sequence = torch.bucketize(tokens, layout.packed.cu_seqlens[1:].long(), right=True)
    together = sequence[:, None] == sequence
    if layout.causal:
        together = together.tril()
    if attention.config._attn_implementation == "eager":
        lowest = torch.finfo(hidden.dtype).min
        return torch.zeros_like(together, dtype=hidden.dtype).masked_fill(~together, lowest)[None, None]
    return together[None, None]


def _check(layer: Patched, hidden: Tensor, attention: Any, head_dim: int, layout: Layout) -> None:
    """Raises Unknown where the call itself rules a promise out."""
    if is_sharded(layer) or layer._fasttune.settings.sharded():
        raise Unknown("its weights are sharded and may be gone when rows are read")
    implementation = attention.config._attn_implementation
    if implementation not in ATTENTIONS:
        raise Unknown(f"attn_implementation={implementation!r}")
    if attentions_wanted():
        raise Unknown("attention weights were asked for")
    if implementation == "eager" and layout.blind:
        raise Unknown("queries that see no key under eager attention")
    if layer.training and getattr(layer, "gradient_checkpointing", False) and not torch.is_grad_enabled():
        raise Unknown("reentrant gradient checkpointing")
    if head_dim > MAX_HEAD_DIM:
        raise Unknown(f"heads of {head_dim} dimensions")
    kind, backend = hidden.device.type, layer._fasttune.backend
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    requested = backend or environment_backend() or "auto"
    why = None if requested == "auto" else why_not("attention", requested, kind, dtype)
    if why is not None:
        raise Unknown(why)
    if not runs_fused("attention", kind, dtype, backend):
        raise Unknown(f"no fused attention of chosen queries for {str(dtype).removeprefix('torch.')} on {kind}")
    settings = layer._fasttune.settings
    if settings.reads_all and not layer.training and not layout.full and not torch.is_grad_enabled():
        raise Unknown("all rows are read in evaluation")


def _dtype(frozen: Frozen, hidden: Tensor, width: int) -> torch.dtype:
    """Of the layer's output: autocast decides, so it is asked, with no rows."""
    if not torch.is_autocast_enabled(hidden.device.type):
        return hidden.dtype
    kind = hidden.device.type
    attended = torch.empty(0, width, dtype=torch.get_autocast_dtype(kind), device=hidden.device)
    rows = torch.empty(0, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
    seeds = [torch.zeros(1, dtype=torch.int64, device=hidden.device) for _ in frozen.dropouts]
    with torch.no_grad(), repeating(seeds):
        return frozen.finish(attended, rows, None).dtype


def ordinary(*values: Any) -> tuple[Any, ...]:
    """Arguments for code that is not fasttune's: promised tensors as ordinary ones."""
    return tuple(materialized(value) for value in values)
