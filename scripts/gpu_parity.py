"""Every operation and patched model on a device against float64, by the tests' own error budget (tests/oracle.py).

    python scripts/gpu_parity.py --out out/gpu [--device cuda] [--backend triton cuda]

Needs torch alone, and Transformers for the models: a GPU image need not hold a test framework. Writes parity.json; ends
with status 1 if a case fails. On a CPU (--device cpu) the same cases run on small shapes.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "patching")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from oracle import DTYPES, SWEEP_SLACK, assert_same_math  # noqa: E402

from fasttune import ops  # noqa: E402
from fasttune.ops._activations import ACTIVATIONS  # noqa: E402

Case = tuple[str, Callable[[], None]]


def _pair(operation: str, backend: str, device: str, dtype: torch.dtype, big: bool) -> Iterator[Case]:
    """Cases of one operation in one dtype: (name, function that raises AssertionError where ours is off)."""

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    def case(name: str, fused: Any, stock: Any, inputs: list[torch.Tensor], slack: float = 1.0) -> Case:
        full = f"{operation} {name} {str(dtype).removeprefix('torch.')} {backend}"
        return full, lambda: assert_same_math(fused, stock, inputs, [str(i) for i in range(len(inputs))], slack)

    rows, columns, tokens = (1037, 768, 300) if big else (37, 96, 40)
    vector = lambda *shape: [random(*shape) for _ in range(2)]  # noqa: E731
    if operation == "attention":
        for head_dim, causal in itertools.product((16, 40, 64, 128) if big else (16,), (False, True)):

            def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = causal) -> torch.Tensor:
                heads_first = [x.transpose(1, 2) for x in (q, k, v)]
                return F.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)

            fused = partial(ops.attention, causal=causal, backend=backend)
            yield case(f"d{head_dim} causal={causal}", fused, stock, [random(2, tokens, 3, head_dim) for _ in range(3)])

        def dropped(backend: str, *x: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(3)
            return ops.attention(*x, causal=True, dropout_p=0.2, backend=backend)

        inputs = [random(2, tokens, 3, 64) for _ in range(3)]
        yield case("dropout", partial(dropped, backend), partial(dropped, "torch"), inputs)

        def windowed(backend: str, causal: bool, *x: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(3)
            return ops.attention(*x, causal=causal, window=70, dropout_p=0.2, backend=backend)

        for causal in (False, True):
            both = [partial(windowed, which, causal) for which in (backend, "torch")]
            yield case(f"window causal={causal}", *both, inputs)
        # Distances with a bucket each, with one for several, and beyond the furthest.
        distance = torch.arange(-90, 91, device=device)
        buckets = (
            distance.sign() * (distance.abs().clamp(max=20) + (distance.abs() - 20).clamp(min=0) // 3) + 43
        ).int()
        terms = [random(3, 181), random(2, tokens, 3, 87), random(2, tokens, 3, 87)]

        def with_terms(
            backend: str, causal: bool, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *of: torch.Tensor
        ) -> torch.Tensor:
            torch.manual_seed(3)
            given = dict(zip(("bias", "c2p", "p2c"), of, strict=True))
            return ops.attention(q, k, v, **given, buckets=buckets, causal=causal, dropout_p=0.2, backend=backend)

        for causal in (False, True):
            both = [partial(with_terms, which, causal) for which in (backend, "torch")]
            # A bias's gradient sums a diagonal's numbers one after the other, stock's in a tree.
            yield case(f"terms causal={causal}", *both, [*inputs, *terms], SWEEP_SLACK)
        offsets = torch.tensor([0, 20, 20, tokens - 7, tokens], dtype=torch.int32, device=device)
        packed = [random(tokens, 3, 64) for _ in range(3)]
        options = {"causal": True, "cu_seqlens": offsets}
        yield case(
            "packed",
            partial(ops.attention, **options, backend=backend),
            partial(ops.attention, **options, backend="torch"),
            packed,
        )
        places = torch.arange(0, tokens, 3, device=device)
        starts = torch.searchsorted(places, offsets)
        positions = places - offsets[torch.bucketize(places, offsets[1:], right=True)]
        options = {"causal": True, "cu_seqlens": offsets, "cu_seqlens_q": starts, "positions_q": positions}

        def of_some(backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(3)
            return ops.attention(q, k, v, dropout_p=0.2, backend=backend, **options)

        tensors = [random(places.numel(), 3, 64), random(tokens, 3, 64), random(tokens, 3, 64)]
        yield case("chosen queries", partial(of_some, backend), partial(of_some, "torch"), tensors)
    elif operation in ("layer_norm", "layer_norm_gelu", "gelu_layer_norm"):

        def norm(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return F.layer_norm(x, x.shape[-1:], w, b, 1e-5)

        stocks = {
            "layer_norm": norm,
            "layer_norm_gelu": lambda *x: F.gelu(norm(*x)),
            "gelu_layer_norm": lambda x, *rest: norm(F.gelu(x), *rest),
        }
        for width in (columns, 1600) if big else (columns,):
            inputs = [random(rows, width), *vector(width)]
            yield case(f"C{width}", partial(getattr(ops, operation), backend=backend), stocks[operation], inputs)
    elif operation == "dropout_add_layer_norm":

        def run(backend: str, *x: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(3)
            return ops.dropout_add_layer_norm(*x, dropout_p=0.2, backend=backend)

        inputs = [*vector(rows, columns), *vector(columns)]
        yield case("", partial(run, backend), partial(run, "torch"), inputs)
    elif operation == "bias_gelu":
        for approximate in ("none", "tanh"):
            fused = partial(ops.bias_gelu, approximate=approximate, backend=backend)
            yield case(
                approximate,
                fused,
                lambda x, b, approximate=approximate: F.gelu(x + b, approximate=approximate),
                [random(rows, columns, scale=3.0), random(columns)],
            )
    elif operation in ("bias_activation", "gated_activation"):
        for activation in ACTIVATIONS:

            def activated(backend: str, x: torch.Tensor, b: torch.Tensor, activation: str = activation) -> torch.Tensor:
                if operation == "bias_activation":
                    return ops.bias_activation(x, b, activation=activation, backend=backend)
                return ops.gated_activation(x, bias=b, activation=activation, backend=backend)

            inputs = [random(rows, columns, scale=3.0), random(columns)]
            yield case(activation, partial(activated, backend), partial(activated, "torch"), inputs)
    elif operation == "dropout":

        def drop(backend: str, *x: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(3)
            return ops.dropout(x[0], dropout_p=0.2, residual=x[1], backend=backend)

        yield case("", partial(drop, backend), partial(drop, "torch"), vector(rows, columns))
    elif operation in ("cross_entropy", "linear_cross_entropy"):
        for classes in (2, 1000, 30522, 50257) if big else (300,):
            target = torch.randint(0, classes, (rows if classes <= 1000 else 65,), device=device)
            target[1::3] = -100
            if operation == "cross_entropy":
                inputs, stock_loss = [random(target.shape[0], classes, scale=3.0)], F.cross_entropy
            else:
                inputs = [random(target.shape[0], 64), random(classes, 64, scale=0.125)]
                stock_loss = lambda x, w, target: F.cross_entropy(F.linear(x, w), target)  # noqa: E731
            yield case(
                f"V{classes}",
                partial(lambda fused, target, *x: fused(*x, target, backend=backend), getattr(ops, operation), target),
                partial(lambda stock, target, *x: stock(*x, target), stock_loss, target),
                inputs,
            )
    elif operation == "linear_log_prob":
        for classes in (2, 1000, 30522, 50257) if big else (300,):
            ids = torch.randint(0, classes, (rows if classes <= 1000 else 65,), device=device)
            ids[1::3] = -100

            def found(name: str, backend: str, ids: torch.Tensor, *x: torch.Tensor) -> torch.Tensor:
                return getattr(ops.linear_log_prob(*x, ids, scale=0.7, backend=backend), name)

            inputs = [random(ids.shape[0], 64), random(classes, 64, scale=0.125)]
            for name in ("log_prob", "logsumexp", "entropy", "mean_logit"):
                sides = (partial(found, name, side, ids) for side in (backend, "torch"))
                yield case(f"{name} V{classes}", *sides, inputs)
    elif operation == "linear_max":
        # Whole numbers: logits are exact in every dtype and mostly tied, so that all agree on the first winner.
        offsets = torch.tensor([0, 20, 20, tokens - 7, tokens], dtype=torch.int32, device=device)
        for classes in (1000, 30522) if big else (300,):
            inputs = [
                torch.randint(-1, 2, shape, device=device).to(dtype)
                for shape in ((tokens, 80), (classes, 80), (classes,))
            ]

            def pooled(backend: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
                return torch.relu(ops.linear_max(x, weight, offsets, linear_bias=bias, backend=backend))

            yield case(f"V{classes}", partial(pooled, backend), partial(pooled, "torch"), inputs)
    elif operation == "embedding":
        ids = torch.randint(0, 90, (4, tokens), device=device)
        types = (torch.arange(tokens, device=device) > tokens // 2).long().expand(4, tokens)

        def summed(word: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
            return ops.embedding(ids, word, token_type_ids=types, token_type_weight=kind, backend=backend)

        yield case(
            "",
            summed,
            lambda word, kind: F.embedding(ids, word) + F.embedding(types, kind),
            [random(100, columns), random(2, columns)],
        )
    elif operation == "rotary":
        for head_dim, width in ((64, 64), (64, 16), (80, 80), (37, 22)) if big else ((20, 12),):
            tables = [torch.randn(tokens, width, device=device).bfloat16().float() for _ in range(2)]
            ids = torch.randint(0, tokens, (rows,), device=device)

            def turned(x: torch.Tensor, tables: Any = tables, ids: torch.Tensor = ids) -> torch.Tensor:
                return ops.rotary(x, *tables, row_ids=ids, rotated=2, backend=backend)

            def composed(x: torch.Tensor, tables: Any = tables, ids: torch.Tensor = ids) -> torch.Tensor:
                width = tables[0].shape[1]
                cos, sin = (table[ids][:, None, None].to(x.dtype) for table in tables)
                part, rest = x[:, :2, :, :width], x[:, :2, :, width:]
                low, high = part.chunk(2, -1)
                part = part * cos + torch.cat((-high, low), -1) * sin
                return torch.cat((torch.cat((part, rest), -1), x[:, 2:]), 1)

            yield case(f"D{head_dim} W{width}", turned, composed, [random(rows, 3, 5, head_dim)])
    elif operation == "packing":
        mask = torch.rand(4, tokens, device=device) < 0.6
        yield case(
            "",
            lambda x: ops.unpack(*ops.pack(x, mask)),
            lambda x: x * mask[..., None].to(x.dtype),
            [random(4, tokens, columns)],
        )


def operation_cases(device: str, backends: list[str], big: bool) -> Iterator[Case]:
    from fasttune.ops import _backends

    for operation in _backends.operations():
        for backend in backends:
            if backend in ops.available_backends(operation):
                for dtype in DTYPES:
                    yield from _pair(operation, backend, device, dtype, big)


# What a backend has no kernels for: patch() with that backend refuses it, and `auto` takes another.
LEFT_OUT: dict[str, dict[str, bool]] = {"cuda": {"embeddings": False, "loss": False}}


def model_cases(device: str, backends: list[str]) -> Iterator[Case]:
    """Loss and every gradient of patched models, dropout 0, against float64, by the bound of tests/patching."""
    if importlib.util.find_spec("transformers") is None:
        return
    from model_parity import check_parity

    heads = ("GPT2LMHeadModel", "GPT2ForSequenceClassification", "BertForMaskedLM", "BertForSequenceClassification")
    for head, dtype, backend in itertools.product(heads, DTYPES, backends):
        name = f"{head} {str(dtype).removeprefix('torch.')} {backend}"
        options = {"backend": backend, **LEFT_OUT.get(backend, {})}
        yield name, partial(check_parity, head, dtype, {"padding": "right"}, device=device, options=options)


def run(cases: Iterator[Case], seconds: float) -> list[dict[str, Any]]:
    """Runs the cases; those that come after `seconds` are reported as not run, which counts as a failure."""
    results, started = [], time.perf_counter()
    for name, check in cases:
        begun = time.perf_counter()
        outcome, message = "passed", ""
        if begun - started > seconds:
            outcome = "not run"
        else:
            try:
                torch.manual_seed(0)
                check()
            except Exception as error:  # whatever it is, it belongs into the report and the rest has to run
                outcome = "failed" if isinstance(error, AssertionError) else "error"
                message = "".join(traceback.format_exception_only(error)).strip()[:600]
        results.append({"case": name, "outcome": outcome, "seconds": time.perf_counter() - begun, "message": message})
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for parity.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", nargs="*", default=["triton", "cuda"])
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--only", nargs="+", default=[""], help="run the cases whose name contains one of these")
    arguments = parser.parse_args(argv)
    torch.backends.cuda.matmul.allow_tf32 = False  # the float32 yardstick is IEEE
    available = set(itertools.chain.from_iterable(map(ops.available_backends, ("attention", "layer_norm"))))
    backends = [backend for backend in arguments.backend if backend in available]
    big = arguments.device != "cpu"
    cases = itertools.chain(operation_cases(arguments.device, backends, big), model_cases(arguments.device, backends))
    results = run((case for case in cases if any(part in case[0] for part in arguments.only)), arguments.seconds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "parity.json").write_text(json.dumps(results, indent=1) + "\n")
    wrong = [result for result in results if result["outcome"] != "passed"]
    for result in wrong:
        print(f"{result['outcome']}: {result['case']}: {result['message']}")
    print(f"{len(results) - len(wrong)} of {len(results)} cases passed on {arguments.device}, backends {backends}")
    return 1 if wrong or not results else 0


if __name__ == "__main__":
    sys.exit(main())
