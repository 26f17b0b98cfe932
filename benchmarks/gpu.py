"""The operations on a GPU, forward and backward, against what one would use without fasttune.

    python benchmarks/gpu.py --out out/gpu [--device cuda] [--seconds 150]

Peers: eager torch; SDPA with its flash, cuDNN and memory-efficient kernels apart; torch.compile;
Liger and flash-attn where they are installed. Times are medians of runs with a cold L2 cache (triton.testing.do_bench).
A peer that cannot do a shape is left out and named in the notes. Where an operation has Triton and CUDA C++ kernels,
both run, and a table of its own says which is faster: what fasttune/ops/_backends.py decides by. Writes benchmarks.json
and benchmarks.md; losses are listed first. On a CPU the same code runs on small shapes, timed by the clock.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from fasttune import ops  # noqa: E402
from fasttune.ops import _backends  # noqa: E402

OURS = "fasttune"
RIVALS = ("triton", "cuda")  # our own backends that run on a GPU
Function = Callable[..., Tensor]
# (operation, shape, sides, inputs); each side maps the inputs to one tensor.
Work = tuple[str, str, dict[str, Function], list[Tensor]]


def _sdpa(kernel: str, causal: bool, dropout_p: float) -> Function:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            heads_first = [x.transpose(1, 2) for x in (query, key, value)]
            return F.scaled_dot_product_attention(*heads_first, dropout_p=dropout_p, is_causal=causal).transpose(1, 2)

    return attend


def _ours(operation: str, device: str, dtype: torch.dtype, **options: Any) -> dict[str, Function]:
    """The operation as `auto` runs it, and by each of RIVALS where both can run."""
    function = partial(getattr(ops, operation), **options)
    rivals = [name for name in RIVALS if _backends.why_not(operation, name, device, dtype) is None]
    both = rivals if len(rivals) == len(RIVALS) else []
    return {OURS: function, **{f"{OURS} {name}": partial(function, backend=name) for name in both}}


def _optional(module: str, attribute: str) -> Any:
    """module.attribute, or None where the package is not installed."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return None
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception:  # a broken peer must not end the run
        return None


def attention_works(device: str, dtype: torch.dtype, big: bool) -> Iterator[Work]:
    shapes = [(8, 512, 12, 64), (32, 128, 12, 64), (4, 2048, 12, 64), (4, 1024, 8, 128)] if big else [(1, 32, 2, 16)]
    flash = _optional("flash_attn", "flash_attn_func")
    for batch, tokens, heads, head_dim in shapes:
        for causal, dropout_p in ((True, 0.0), (False, 0.1)):
            options = {"causal": causal, "dropout_p": dropout_p}
            sides = _ours("attention", device, dtype, **options)
            for name, kernel in (
                ("SDPA flash", "FLASH_ATTENTION"),
                ("SDPA cuDNN", "CUDNN_ATTENTION"),
                ("SDPA efficient", "EFFICIENT_ATTENTION"),
                ("SDPA math", "MATH"),
            ):
                sides[name] = _sdpa(kernel, causal, dropout_p)
            if flash is not None:
                sides["flash-attn"] = partial(flash, **options)
            inputs = [torch.randn(batch, tokens, heads, head_dim, device=device).to(dtype) for _ in range(3)]
            shape = f"B{batch} T{tokens} H{heads} D{head_dim}" + (" causal" if causal else f" dropout {dropout_p}")
            yield "attention", shape, sides, inputs


def elementwise_works(device: str, dtype: torch.dtype, big: bool) -> Iterator[Work]:
    for rows, columns in ((8192, 768), (8192, 1024), (4096, 4096)) if big else ((16, 64),):
        x, residual = (torch.randn(rows, columns, device=device).to(dtype) for _ in range(2))
        weight, bias = torch.ones(columns, device=device).to(dtype), torch.zeros(columns, device=device).to(dtype)

        def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], weight, bias)

        def dropped(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(F.dropout(x, 0.1) + residual, x.shape[-1:], weight, bias)

        ours = partial(_ours, device=device, dtype=dtype)
        sides = {**ours("layer_norm"), "eager": norm, "torch.compile": torch.compile(norm)}
        liger = _optional("liger_kernel.ops.layer_norm", "LigerLayerNormFunction")
        if liger is not None:
            sides["Liger"] = lambda x, w, b, liger=liger: liger.apply(x, w, b, 1e-5)
        yield "layer_norm", f"{rows} x {columns}", sides, [x, weight, bias]
        yield (
            "dropout_add_layer_norm",
            f"{rows} x {columns}",
            {
                **ours("dropout_add_layer_norm", dropout_p=0.1),
                "eager": dropped,
                "torch.compile": torch.compile(dropped),
            },
            [x, residual, weight, bias],
        )

        def activation(x: Tensor, bias: Tensor) -> Tensor:
            return F.gelu(x + bias)

        yield (
            "bias_gelu",
            f"{rows} x {columns}",
            {**ours("bias_gelu"), "eager": activation, "torch.compile": torch.compile(activation)},
            [x, bias],
        )

        def gated(a: Tensor) -> Tensor:
            activated, gate = a.chunk(2, dim=-1)
            return F.gelu(activated) * gate

        yield (
            "gated_activation",
            f"{rows} x {columns}",
            {**ours("gated_activation"), "eager": gated, "torch.compile": torch.compile(gated)},
            [x],
        )


def rotary_works(device: str, dtype: torch.dtype, big: bool) -> Iterator[Work]:
    """Of the query alone: every side returns one tensor, and a packed projection would have to be put together."""
    for batch, tokens, heads, head_dim in ((8, 1024, 12, 64), (4, 2048, 32, 128)) if big else ((1, 16, 2, 16),):
        x = torch.randn(batch, tokens, heads, head_dim, device=device).to(dtype)
        cos, sin = (torch.randn(tokens, head_dim, device=device).to(dtype) for _ in range(2))

        def composed(x: Tensor, cos: Tensor = cos[:, None], sin: Tensor = sin[:, None]) -> Tensor:
            low, high = x.chunk(2, -1)
            return x * cos + torch.cat((-high, low), -1) * sin

        ours = _ours("rotary", device, dtype, cos=cos, sin=sin)
        sides: dict[str, Function] = {**ours, "eager": composed, "torch.compile": torch.compile(composed)}
        yield "rotary", f"B{batch} T{tokens} H{heads} D{head_dim}", sides, [x]


def loss_works(device: str, dtype: torch.dtype, big: bool) -> Iterator[Work]:
    for rows, classes in ((4096, 50257), (4096, 30522)) if big else ((8, 100),):
        logits = torch.randn(rows, classes, device=device).to(dtype)
        target = torch.randint(0, classes, (rows,), device=device)
        hidden = torch.randn(rows, 768 if big else 16, device=device).to(dtype)
        weight = (torch.randn(classes, hidden.shape[1], device=device) * 0.02).to(dtype)

        def loss(logits: Tensor, target: Tensor = target) -> Tensor:
            return F.cross_entropy(logits, target)

        def linear_loss(hidden: Tensor, weight: Tensor, target: Tensor = target) -> Tensor:
            return F.cross_entropy(F.linear(hidden, weight), target)

        sides: dict[str, Function] = {
            **_ours("cross_entropy", device, dtype, target=target),
            "eager": loss,
            "torch.compile": torch.compile(loss),
        }
        yield "cross_entropy", f"{rows} x {classes}", sides, [logits]
        sides = {
            OURS: lambda hidden, weight, target=target: ops.linear_cross_entropy(hidden, weight, target),
            "eager": linear_loss,
            "torch.compile": torch.compile(linear_loss),
        }
        liger = _optional("liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
        if liger is not None:
            sides["Liger"] = lambda hidden, weight, target=target, liger=liger: liger.apply(hidden, weight, target)[0]
        yield "linear_cross_entropy", f"{rows} x {hidden.shape[1]} x {classes}", sides, [hidden, weight]


def _step(function: Function, inputs: list[Tensor]) -> Callable[[], Any]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    upstream = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


def _median_ms(step: Callable[[], Any], device: str) -> float:
    step()
    if device == "cpu":
        times = []
        for _ in range(3):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
        return statistics.median(times) * 1e3
    import triton.testing

    return float(triton.testing.do_bench(step, warmup=10, rep=50, return_mode="median"))


def measure(works: Iterator[Work], device: str, seconds: float) -> list[dict[str, Any]]:
    rows, started = [], time.perf_counter()
    for operation, shape, sides, inputs in works:
        if time.perf_counter() - started > seconds:
            rows.append({"operation": operation, "shape": shape, "ms": {}, "notes": ["not run: out of time"]})
            continue
        times, notes = {}, []
        for name, function in sides.items():
            try:
                times[name] = _median_ms(_step(function, inputs), device)
            except Exception as error:  # a peer that cannot do this shape is no reason to stop
                notes.append(f"{name}: {str(error).strip().splitlines()[0] if str(error) else type(error).__name__}")
        rows.append({"operation": operation, "shape": shape, "ms": times, "notes": notes})
    return rows


def ratio(row: dict[str, Any]) -> float | None:
    """Time of the fastest peer over ours: above 1 we are faster."""
    peers = [time for name, time in row["ms"].items() if not name.startswith(OURS)]
    return min(peers) / row["ms"][OURS] if peers and OURS in row["ms"] else None


def rivalry(rows: list[dict[str, Any]]) -> list[str]:
    """Our Triton and CUDA C++ kernels side by side, and the operations in which CUDA C++ was never slower."""
    raced = [(row, [row["ms"].get(f"{OURS} {name}") for name in RIVALS]) for row in rows]
    raced = [(row, times) for row, times in raced if None not in times]
    if not raced:
        return []
    lines = ["", "| operation | shape | Triton | CUDA C++ | Triton's time over CUDA C++'s |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['operation']} | {row['shape']} | {triton:.3f} | {cuda:.3f} | {triton / cuda:.2f} |"
        for row, (triton, cuda) in raced
    ]
    slower = {row["operation"] for row, (triton, cuda) in raced if cuda > triton}
    never = sorted({row["operation"] for row, _ in raced} - slower)
    return [*lines, "", f"For CUDA_BEATS_TRITON (fasttune/ops/_backends.py): {', '.join(never) or 'none'}."]


def markdown(rows: list[dict[str, Any]], machine: dict[str, str]) -> str:
    lines = ["# Operations on a GPU, forward and backward", ""]
    lines += [f"- {key}: {value}" for key, value in machine.items()]
    lines += ["", "Milliseconds, medians; the ratio is the fastest peer's time over ours, losses first.", ""]
    lines += ["| operation | shape | ratio | fasttune | peers |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: ratio(row) or 0.0):
        times = dict(row["ms"])
        ours = times.pop(OURS, None)
        times = {name: time for name, time in times.items() if not name.startswith(OURS)}
        peers = ", ".join(f"{name} {time:.3f}" for name, time in times.items())
        against = ratio(row)
        lines.append(
            f"| {row['operation']} | {row['shape']} | {'–' if against is None else f'{against:.2f}'}"
            f" | {'–' if ours is None else f'{ours:.3f}'} | {peers} |"
        )
    notes = [f"- {row['operation']} {row['shape']}: {note}" for row in rows for note in row["notes"]]
    lines += rivalry(rows)
    return "\n".join([*lines, *(["", "Left out:", "", *notes] if notes else [])]) + "\n"


def describe(device: str) -> dict[str, str]:
    versions = {"torch": torch.__version__, "device": device}
    for name in ("triton", "transformers", "flash_attn", "liger_kernel"):
        if importlib.util.find_spec(name) is not None:
            versions[name] = str(getattr(importlib.import_module(name), "__version__", "installed"))
    if device != "cpu":
        versions["device"] = torch.cuda.get_device_name()
        versions["CUDA"] = str(torch.version.cuda or torch.version.hip)
    return versions


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=150.0)
    arguments = parser.parse_args(argv)
    device, big = arguments.device, arguments.device != "cpu"

    def works() -> Iterator[Work]:
        for make in (attention_works, elementwise_works, rotary_works, loss_works):
            yield from make(device, torch.bfloat16, big)

    machine = describe(device)
    rows = measure(works(), device, arguments.seconds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "benchmarks.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    (arguments.out / "benchmarks.md").write_text(markdown(rows, machine))
    print(f"{len(rows)} benchmarks on {machine['device']}: {arguments.out / 'benchmarks.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
