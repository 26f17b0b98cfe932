"""Every Triton kernel as the library launches it: the calls that are compiled ahead of time (see aot.py).

A case calls a launcher in fasttune/kernels on fake CUDA tensors; all kernels it launches are compiled and held against
benchmarks/gpu_budgets.toml, for every target: five minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fasttune.ops._attention_call import Call

TARGETS = ("sm80", "sm90", "sm100", "gfx942")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# BERT-base with 8 sequences of 512 tokens: the shapes behind the figures of the report.
SEQUENCES, TOKENS, HIDDEN = 8, 512, 768
CLASSES = 50257  # GPT-2's vocabulary
ROWS = SEQUENCES * TOKENS
CHOSEN = ROWS // 8  # queries of some positions only: masked language modelling labels about so many


@dataclasses.dataclass(frozen=True)
class Case:
    """`call` makes its own tensors on device "cuda". `facts`: what the budget's conditions may ask of it."""

    operation: str
    variant: str
    dtype: torch.dtype
    call: Callable[[], Any]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return " ".join(filter(None, (self.operation, self.variant, self.dtype_name)))


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def new_seed() -> torch.Tensor:
    return empty(1, dtype=torch.int64)


def _attention(
    dtype: torch.dtype, head_dim: int, causal: bool, dropout: bool, packed: bool, window: int | None = None
) -> Callable[[], Any]:
    def call() -> None:
        from fasttune.kernels import attention

        heads = HIDDEN // head_dim
        shape = (ROWS, heads, head_dim) if packed else (SEQUENCES, TOKENS, heads, head_dim)
        query = empty(*shape, dtype=dtype)
        offsets = empty(SEQUENCES + 1, dtype=torch.int32) if packed else None
        seed = new_seed() if dropout else None
        dropout_p = 0.1 if dropout else 0.0
        asked = Call(offsets, seed=seed, causal=causal, scale=head_dim**-0.5, dropout_p=dropout_p, window=window)
        out, lse = attention.forward(query, query, query, asked)
        gradients = [*(torch.empty_like(query) for _ in range(3)), None, None, None]
        attention.backward(out, (query, query, query, out, lse), gradients, asked)

    return call


def _chosen_queries(dtype: torch.dtype, head_dim: int, dropout: bool) -> Callable[[], Any]:
    def call() -> None:
        from fasttune.kernels import attention

        heads = HIDDEN // head_dim
        query, key = (empty(rows, heads, head_dim, dtype=dtype) for rows in (CHOSEN, ROWS))
        offsets, positions = empty(SEQUENCES + 1, dtype=torch.int32), empty(CHOSEN, dtype=torch.int32)
        variant = (new_seed() if dropout else None, True, head_dim**-0.5, 0.1 if dropout else 0.0)
        asked = Call(offsets, offsets, positions, None, *variant)
        out, lse = attention.forward(query, key, key, asked)
        gradients = [*map(torch.empty_like, (query, key, key)), None, None, None]
        attention.backward(out, (query, key, key, out, lse), gradients, asked)

    return call


def _with_terms(dtype: torch.dtype, terms: str) -> Callable[[], Any]:
    """Bidirectional, with dropout: a bias as MPNet has it, or the terms of DeBERTa v3."""

    def call() -> None:
        from fasttune.kernels import attention

        heads = HIDDEN // 64
        query = empty(SEQUENCES, TOKENS, heads, 64, dtype=dtype)
        of: dict[str, Any] = {"bias": empty(heads, 257, dtype=torch.float32)}
        if terms == "disentangled":
            positions = empty(SEQUENCES, TOKENS, heads, 512, dtype=dtype)
            of = {"c2p": positions, "p2c": positions, "buckets": empty(1025, dtype=torch.int32)}
        asked = Call(seed=new_seed(), scale=0.125, dropout_p=0.1, **of)
        out, lse = attention.forward(query, query, query, asked)
        gradients = [torch.empty_like(x) if x is not None else None for x in (query, query, query, *asked[-4:-1])]
        attention.backward(out, (query, query, query, out, lse), gradients, asked)

    return call


def attention_cases() -> Iterator[Case]:
    for dtype, head_dim, dropout, packed in itertools.product(DTYPES, (64, 128), (False, True), (False, True)):
        if (packed and (head_dim, dtype) != (64, torch.bfloat16)) or (dropout and dtype == torch.float16):
            continue  # the way to a sequence's rows is the same for all, dropout in both 16-bit types
        parts = (f"d{head_dim}", "causal", "packed" if packed else "", "dropout" if dropout else "")
        yield Case(
            "attention",
            " ".join(filter(None, parts)),
            dtype,
            _attention(dtype, head_dim, True, dropout, packed),
            {"head_dim": head_dim, "dropout": dropout},
        )
    for head_dim, dtype, dropout in itertools.product((64, 128), DTYPES, (False, True)):
        if (head_dim == 128 or dtype == torch.float32) and dropout:
            continue  # queries carry positions: nothing that dropout or the head dimension adds to
        parts = (f"d{head_dim}", "causal", "chosen", "dropout" if dropout else "")
        yield Case(
            "attention",
            " ".join(filter(None, parts)),
            dtype,
            _chosen_queries(dtype, head_dim, dropout),
            {"head_dim": head_dim, "dropout": dropout},
        )
    # A window: of ModernBERT's local layers, and of GPT-Neo's, which drop no weights. Its size compiles nothing.
    for head_dim, causal, dropout, packed, window in (
        (64, False, False, True, 64),
        (64, False, True, True, 64),
        (128, True, False, False, 255),
    ):
        parts = (f"d{head_dim}", "causal" if causal else "", "packed" if packed else "", "window")
        yield Case(
            "attention",
            " ".join(filter(None, (*parts, "dropout" if dropout else ""))),
            torch.bfloat16,
            _attention(torch.bfloat16, head_dim, causal, dropout, packed, window),
            {"head_dim": head_dim, "dropout": dropout, "window": window},
        )
    for terms, dtype in itertools.product(("bias", "disentangled"), (torch.bfloat16, torch.float32)):
        facts = {"head_dim": 64, "dropout": True, "terms": terms}
        yield Case("attention", f"d64 {terms} dropout", dtype, _with_terms(dtype, terms), facts)
    # Masks without the diagonal, and head dimensions that are padded inside, change little: one of each.
    yield Case(
        "attention",
        "d64",
        torch.bfloat16,
        _attention(torch.bfloat16, 64, False, False, False),
        {"head_dim": 64, "dropout": False},
    )
    yield Case(
        "attention",
        "d48 causal",
        torch.bfloat16,
        _attention(torch.bfloat16, 48, True, False, False),
        {"head_dim": 48, "dropout": False},
    )


def _dropout(dtype: torch.dtype) -> Callable[[], Any]:
    def call() -> None:
        from fasttune.kernels import dropout

        x = empty(ROWS, HIDDEN, dtype=dtype)
        dropout.dropout(x, x, None, new_seed(), 0.1)

    return call


def _activation(dtype: torch.dtype, name: str, gated: bool, biased: bool) -> Callable[[], Any]:
    def call() -> None:
        from fasttune.kernels import activation
        from fasttune.ops._activations import ACTIVATIONS, halves

        columns = 4 * HIDDEN
        out = empty(ROWS, columns, dtype=dtype)
        stride = 2 * columns if gated else columns
        x, dx = (empty(ROWS, stride, dtype=dtype) for _ in range(2))
        gate, dgate, bias = None, None, empty(stride, dtype=dtype) if biased else None
        if gated:  # halves of one tensor, as ModernBERT's
            (x, gate), (dx, dgate) = halves(x, None), halves(dx, None)
        sizes, strides = (ROWS, columns), (stride, stride if gated else 0)
        activation.forward(x, gate, bias, out, *sizes, strides, ACTIVATIONS[name])
        activation.backward(out, x, gate, bias, dx, dgate, bias, *sizes, (*strides, stride), ACTIVATIONS[name])

    return call


def _layer_norm(dtype: torch.dtype, columns: int, dropout: bool) -> Callable[[], Any]:
    def call() -> None:
        from fasttune.kernels import layer_norm

        x, weight = empty(ROWS, columns, dtype=dtype), empty(columns, dtype=dtype)
        needs = (True, dropout, True, True)
        if dropout:
            seed = new_seed()
            _, total, statistics = layer_norm.dropout_add_layer_norm(x, x, weight, weight, None, seed, 0.1, 1e-5, True)
            layer_norm.layer_norm_backward(x, None, total, weight, weight, statistics, None, seed, 0.1, dtype, *needs)
        else:
            _, statistics = layer_norm.layer_norm(x, weight, weight, 1e-5)
            layer_norm.layer_norm_backward(x, None, x, weight, weight, statistics, None, None, 0.0, dtype, *needs)

    return call


def _layer_norm_gelu(dtype: torch.dtype, before: bool) -> Callable[[], Any]:
    def call() -> None:
        from fasttune.kernels import layer_norm

        x, weight = empty(ROWS, HIDDEN, dtype=dtype), empty(HIDDEN, dtype=dtype)
        forward = layer_norm.gelu_layer_norm if before else layer_norm.layer_norm_gelu
        backward = layer_norm.gelu_layer_norm_backward if before else layer_norm.layer_norm_gelu_backward
        _, statistics = forward(x, weight, weight, 1e-5, False)
        backward(x, x, weight, weight, statistics, False, True, True, True)

    return call


def elementwise_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        yield Case("dropout", "", dtype, _dropout(dtype), {"dropout": True})
        yield Case("bias_gelu", "erf", dtype, _activation(dtype, "gelu", False, True))
        yield Case("bias_gelu", "tanh", dtype, _activation(dtype, "gelu_tanh", False, True))
        yield Case("gated_activation", "gelu", dtype, _activation(dtype, "gelu", True, False))
        if dtype == torch.bfloat16:  # less work than a GELU, in the same kernels
            yield Case("bias_activation", "silu", dtype, _activation(dtype, "silu", False, True))
            yield Case("gated_activation", "relu2", dtype, _activation(dtype, "relu2", True, False))
        yield Case("gated_activation", "gelu bias", dtype, _activation(dtype, "gelu", True, True))
        yield Case("layer_norm", "", dtype, _layer_norm(dtype, HIDDEN, False))
        yield Case("layer_norm", "C1600", dtype, _layer_norm(dtype, 1600, False))
        yield Case("dropout_add_layer_norm", "", dtype, _layer_norm(dtype, HIDDEN, True), {"dropout": True})
        yield Case("layer_norm_gelu", "", dtype, _layer_norm_gelu(dtype, False))
        yield Case("gelu_layer_norm", "", dtype, _layer_norm_gelu(dtype, True))


def _cross_entropy(dtype: torch.dtype, smoothing: bool) -> Callable[[], Any]:
    def call() -> None:
        from fasttune.kernels import cross_entropy

        logits, target = empty(ROWS, CLASSES, dtype=dtype), empty(ROWS, dtype=torch.int64)
        weight = empty(CLASSES, dtype=torch.float32) if smoothing else None
        options = (-100, 0.1 if smoothing else 0.0, 1)
        loss, *kept = cross_entropy.cross_entropy(logits, target, weight, *options)
        cross_entropy.cross_entropy_backward(loss, logits, target, weight, *kept, *options)

    return call


def _linear_cross_entropy(dtype: torch.dtype) -> Callable[[], Any]:
    def call() -> None:
        from fasttune.kernels import linear_cross_entropy

        x, weight, bias = (
            empty(ROWS, HIDDEN, dtype=dtype),
            empty(CLASSES, HIDDEN, dtype=dtype),
            empty(CLASSES, dtype=dtype),
        )
        options = (empty(ROWS, dtype=torch.int64), bias, None, None, 1.0, -100, 0.0, 1, True, True, True)
        _, gradient, *_ = linear_cross_entropy.linear_cross_entropy(x, weight, *options)
        linear_cross_entropy.scale_in_place(gradient, empty(1, dtype=torch.float32))

    return call


def _linear_log_prob(dtype: torch.dtype, entropy_alone: bool) -> Callable[[], Any]:
    def call() -> None:
        from fasttune.kernels import linear_log_prob

        x, weight, bias = (empty(*shape, dtype=dtype) for shape in ((ROWS, HIDDEN), (CLASSES, HIDDEN), (CLASSES,)))
        options = (x, weight, empty(ROWS, dtype=torch.int64), bias)
        if entropy_alone:
            options = (x, weight, None, None)
        *found, _, statistics = linear_log_prob.linear_log_prob(*options, 0.7, -100)
        if entropy_alone:
            found = [None, None, found[2], None]
        linear_log_prob.linear_log_prob_backward(*found, *options, statistics, 0.7, -100, True, True, True)

    return call


def _linear_max(dtype: torch.dtype) -> Callable[[], Any]:
    def call() -> None:
        from fasttune.kernels import linear_max

        x, weight, bias = (empty(*shape, dtype=dtype) for shape in ((ROWS, HIDDEN), (CLASSES, HIDDEN), (CLASSES,)))
        offsets = empty(SEQUENCES + 1, dtype=torch.int32)
        out, token = linear_max.linear_max(x, weight, bias, offsets)
        linear_max.linear_max_backward(out, x, weight, bias, offsets, token, True, True, True)

    return call


def _embedding(dtype: torch.dtype) -> Callable[[], Any]:
    def call() -> None:
        from fasttune.kernels import embedding

        ids = empty(SEQUENCES, TOKENS, dtype=torch.int64)
        word, token_type, position = (empty(size, HIDDEN, dtype=dtype) for size in (CLASSES, 2, TOKENS))
        out = embedding.embedding_sum(ids, word, ids, token_type, ids, position, None, False)
        embedding.embedding_gradient(out, ids, CLASSES, 0)

    return call


def _rotary(dtype: torch.dtype, width: int, packed: bool) -> Callable[[], Any]:
    def call() -> None:
        from fasttune.kernels import rotary

        shape = (1, ROWS) if packed else (SEQUENCES, TOKENS)
        x, out = (empty(*shape, 3, HIDDEN // 64, 64, dtype=dtype) for _ in range(2))
        table = empty(TOKENS, width, dtype=dtype if packed else torch.float32)
        row_ids = empty(ROWS, dtype=torch.int64) if packed else None
        for inverse in (False, True):
            rotary.rotary(x, out, table, table, row_ids, 2, inverse)

    return call


def _packing(dtype: torch.dtype) -> Callable[[], Any]:
    def call() -> None:
        from fasttune.kernels import packing

        rows, indices = empty(ROWS, HIDDEN, dtype=dtype), empty(ROWS // 2, dtype=torch.int64)
        packing.scatter_rows(packing.gather_rows(rows, indices, ROWS), indices, ROWS)

    return call


def loss_and_index_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        yield Case("cross_entropy", "", dtype, _cross_entropy(dtype, False))
        yield Case("cross_entropy", "weighted smooth", dtype, _cross_entropy(dtype, True))
        yield Case("linear_cross_entropy", "", dtype, _linear_cross_entropy(dtype))
        yield Case("linear_log_prob", "", dtype, _linear_log_prob(dtype, False))
        yield Case("linear_log_prob", "entropy alone", dtype, _linear_log_prob(dtype, True))
        yield Case("linear_max", "", dtype, _linear_max(dtype))
        yield Case("embedding", "", dtype, _embedding(dtype))
        yield Case("packing", "", dtype, _packing(dtype))
        yield Case("rotary", "", dtype, _rotary(dtype, 64, False))
    # A quarter of a head, tables in 16 bits, chosen rows: each adds a load or a mask, the same in every dtype.
    yield Case("rotary", "quarter packed", torch.bfloat16, _rotary(torch.bfloat16, 16, True))


def cases() -> list[Case]:
    return [*attention_cases(), *elementwise_cases(), *loss_and_index_cases()]
