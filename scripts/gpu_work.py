"""What each Triton kernel moves and computes for the shapes of gpu_cases.py, and what an H100 needs for it at least.

Bytes are what has to pass through device memory once, operations are counted from the kernels' formulas (the files in
kernels/ state them). The bound is the largest of four times: memory, matrix instructions, other instructions,
exponentials. H100 SXM, NVIDIA's data sheet: 3.35 TB/s; 989 TFLOP/s in 16 bits, dense; 67 TFLOP/s in float32, that is
33.5 T instructions/s, a fused multiply-add being one; an eighth of that for exponentials (16 a clock for 128 lanes).
"""

from __future__ import annotations

import dataclasses

import torch
from gpu_cases import BUCKETS, CHOSEN, CLASSES, HIDDEN, ROWS, SEQUENCES, TOKENS, Case

MEMORY = 3.35e12  # bytes/s
MATRIX = 989e12  # FLOP/s, bfloat16 and float16
INSTRUCTIONS = 33.5e12  # 1/s: 132 multiprocessors, 128 lanes, 1.98 GHz
EXPONENTIALS = INSTRUCTIONS / 8  # 16 a clock and multiprocessor


@dataclasses.dataclass(frozen=True)
class Work:
    """Per element of the result; `elements` in all."""

    elements: int
    bytes: float
    operations: float
    matrix_flops: float = 0.0
    exponentials: float = 0.0

    def bound(self, dtype: torch.dtype) -> tuple[float, str]:
        """(seconds, what bounds it) on an H100."""
        matrix = MATRIX if dtype != torch.float32 else 2 * INSTRUCTIONS
        times = {
            "memory": self.bytes / MEMORY,
            "matrix" if dtype != torch.float32 else "float32 FMA": self.matrix_flops / matrix,
            "instructions": self.operations / INSTRUCTIONS,
            "exponentials": self.exponentials / EXPONENTIALS,
        }
        what = max(times, key=lambda key: times[key])
        return self.elements * times[what], what


def _attention(kernel: str, case: Case) -> Work:
    """Elements of out, dQ or dK; a causal row has half the keys, or those of its window before it. The
    products of a query and a key are shared by the head's elements."""
    size, head_dim = case.dtype.itemsize, case.facts["head_dim"]
    queries = CHOSEN if "chosen" in case.variant else ROWS
    # Tensors with a row for each query and with one for each key, products, operations.
    of_queries, of_keys, products, operations = {
        "attention_forward_kernel": (2, 2, 2, 7),
        "attention_dq_kernel": (4, 2, 3, 7),
        "attention_dkdv_kernel": (2, 4, 4, 7),
    }[kernel]
    rows, others = (ROWS, queries) if kernel == "attention_dkdv_kernel" else (queries, ROWS)
    sides = 1 if "causal" in case.variant else 2
    pairs = TOKENS * others / ROWS * sides / 2
    if "window" in case.facts:
        pairs = min(pairs, sides * case.facts["window"] + 1)
    tensors = (of_queries * queries + of_keys * ROWS) / rows
    if case.facts["dropout"]:
        operations += 15 if kernel != "attention_dkdv_kernel" else 26
    terms, rows_of_buckets = case.facts.get("terms", ""), 0.0
    if "bias" in terms:  # the place of a distance, its bias; the diagonals of dS
        operations += 14 if kernel == "attention_dq_kernel" else 6
    if "disentangled" in terms:  # c2p and p2c, read; a gradient of one of them in float32, read and written
        operations += 10 if kernel == "attention_forward_kernel" else 18
        rows_of_buckets = BUCKETS / head_dim * (2 * size + (0 if kernel == "attention_forward_kernel" else 8))
    return Work(
        rows * HIDDEN,
        tensors * size + 8 / head_dim * queries / rows + rows_of_buckets,
        operations * pairs / head_dim,
        2 * products * pairs,
        pairs / head_dim,
    )


def work(kernel: str, case: Case) -> Work | None:
    """The work of one launch of `kernel` in `case`; None for small second stages, whose time is a launch's."""
    size, hidden, logits = case.dtype.itemsize, ROWS * HIDDEN, ROWS * CLASSES
    if case.operation == "attention":
        return _attention(kernel, case)
    if case.operation in ("layer_norm", "dropout_add_layer_norm", "layer_norm_gelu", "gelu_layer_norm"):
        columns = 1600 if case.variant == "C1600" else HIDDEN
        tensors = 4 if case.facts.get("dropout") else 2
        extra = 16 if case.facts.get("dropout") else 20 if "gelu" in case.operation else 0
        if kernel == "layer_norm_forward_kernel":
            return Work(ROWS * columns, tensors * size + 8 / columns, 10 + extra)
        if kernel == "layer_norm_backward_kernel":
            return Work(ROWS * columns, max(3, tensors) * size + 8 / columns, 20 + extra)
    gated = case.operation == "gated_activation"
    chunk_step = 3 if case.operation == "linear_cross_entropy" else 1
    known = {
        "dropout_kernel": Work(hidden, 3 * size, 16),
        "activation_forward_kernel": Work(4 * hidden, (2 + gated) * size, 15, 0.0, 1),
        "activation_backward_kernel": Work(4 * hidden, (3 + 2 * gated) * size, 20 + 2 * gated, 0.0, 1),
        "cross_entropy_forward_kernel": Work(logits, (2 if chunk_step == 3 else 1) * size, 8 * chunk_step, 0.0, 2),
        "cross_entropy_backward_kernel": Work(logits, 2 * size, 8, 0.0, 1),
        "log_prob_forward_kernel": Work(logits, size, 14, 0.0, 1),
        "log_prob_backward_kernel": Work(logits, 2 * size, 8, 0.0, 1),
        # Of logits, dx and dw; the two products as if no tile of P were empty, dw as if no gradient were 0.
        "linear_max_forward_kernel": Work(logits, (HIDDEN / CLASSES + HIDDEN / ROWS) * size, 6, 2 * HIDDEN),
        "linear_max_dinput_kernel": Work(
            hidden, (1 + CLASSES / ROWS) * size + (size + 4) * CLASSES / TOKENS / HIDDEN, 3 * CLASSES / 128, 2 * CLASSES
        ),
        "linear_max_dweight_kernel": Work(
            CLASSES * HIDDEN, (1 + ROWS / CLASSES) * size + (size + 4) * SEQUENCES / HIDDEN, SEQUENCES
        ),
        "embedding_sum_kernel": Work(hidden, 4 * size + 24 / HIDDEN, 2),
        "run_sums_kernel": Work(hidden, 2 * size, 1),
        "gather_rows_kernel": Work(hidden // 2, 2 * size, 0),
        # Two parts of three are turned. Tables of a quarter of a head in 16 bits and row numbers, or float32 tables.
        "rotary_kernel": Work(3 * hidden, 2 * size + (72 if case.variant else 512) / (3 * HIDDEN), 4),
        "scale_kernel": Work(hidden, 0, 0),
    }
    return known.get(kernel)
