"""The `fasttune` command: `doctor` says what runs here and what would be gained, `bench` measures it, `verify` compares
a model of yours with stock."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from fasttune import ops, verification
from fasttune.ops import _backends, _cpp, _cuda

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Cheaper fine-tuning steps: what runs here, and how fast."
)


# ------------------------------------------------------------------------------------------------------------- doctor


@app.command()
def doctor() -> None:
    """Says which backends run here, why others do not, and what would be gained by installing what is missing."""
    console = Console(highlight=False)
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in [*_versions(), *_machine()]:
        facts.add_row(name, value)
    console.print(facts)
    table = Table(title="\nOperations", title_justify="left")
    for column in ("operation", "runs on the CPU with", "on a GPU with", "all backends available here"):
        table.add_column(column)
    for operation in _backends.operations():
        gpu = "nothing (no GPU)"
        if torch.cuda.is_available():
            gpu = _backends._decide(operation, "cuda", torch.float32, None, None)
        cpu = _backends._decide(operation, "cpu", torch.float32, None, None)
        table.add_row(operation, cpu, gpu, ", ".join(ops.available_backends(operation)))
    console.print(table)
    advice = _advice()
    console.print("\nWhat would be gained" if advice else "\nNothing is missing.")
    for line in advice:
        console.print(f"  - {line}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> list[tuple[str, str]]:
    rows = [("fasttune", _version("fasttune") or "not installed, used from a checkout")]
    rows.append(("python", platform.python_version()))
    rows += [(name, _version(name) or "not installed") for name in ("torch", "transformers", "triton")]
    return rows


def _machine() -> list[tuple[str, str]]:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    rows = [("processor", f"{_processor()}, {cores} cores usable, torch uses {torch.get_num_threads()} threads")]
    if _cpp.library is None:
        rows.append(("compiled library", f"no: {_cpp.unavailable_reason}"))
    else:
        rows.append(("compiled library", f"yes, {_cpp.library.__file__}"))
        available = ", ".join(_cpp.library.available_isas())
        rows.append(("instruction set", f"{_cpp.library.active_isa()} (this processor can run {available})"))
    rows.append(("CUDA library", _cuda_library()))
    rows.append(("GPU", _gpu()))
    for variable in ("FASTTUNE_BACKEND", "FASTTUNE_CPU_ISA", "TRITON_INTERPRET"):
        if os.environ.get(variable):
            rows.append((variable, os.environ[variable]))
    return rows


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu() -> str:
    if torch.cuda.is_available():
        names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
        kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        return f"{torch.cuda.device_count()} x {', '.join(names)} ({kind})"
    if torch.version.cuda or torch.version.hip:
        return "none found, though this torch was built for one: is the driver installed and the device visible?"
    return "none usable: this torch is a CPU build"


def _cuda_library() -> str:
    reason = _cuda.why_not(None)
    if _cuda.library is None:
        return f"no: {reason}"
    return f"yes, {_cuda.library.__file__}" + ("" if reason is None else f"; it cannot run here: {reason}")


def _advice() -> list[str]:
    lines = []
    if _cpp.library is None:
        lines.append(
            "The compiled CPU library: operations on CPU tensors run several times faster with it than on the torch"
            f" backend. It is missing because {_cpp.unavailable_reason}."
        )
    else:
        active, available = _cpp.library.active_isa(), _cpp.library.available_isas()
        if active != available[-1]:
            lines.append(f"The instruction set {available[-1]}: unset FASTTUNE_CPU_ISA, it holds fasttune to {active}.")
    if os.environ.get("FASTTUNE_BACKEND") not in (None, "", "auto"):
        lines.append("The best backend for each tensor: unset FASTTUNE_BACKEND, it forces one for everything.")
    has_triton_kernels = any("triton" in implemented for implemented in _backends._implemented.values())
    if torch.cuda.is_available() and has_triton_kernels and importlib.util.find_spec("triton") is None:
        lines.append("The Triton kernels for this GPU: pip install 'triton>=3.6'.")
    if importlib.util.find_spec("transformers") is None:
        lines.append("fasttune.patch(model) needs Hugging Face Transformers: pip install 'transformers>=5.17'.")
    return lines


# -------------------------------------------------------------------------------------------------------------- bench


@app.command()
def bench(small: bool = typer.Option(False, help="Run the small comparison even inside a checkout.")) -> None:
    """Runs the benchmark suite of a checkout; elsewhere compares a few operations with stock torch, in a minute."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    if not small and any(folder.glob("*.py")) and importlib.util.find_spec("pytest_benchmark"):
        command = [sys.executable, "-m", "pytest", str(folder), "--benchmark-only"]
        raise typer.Exit(subprocess.run(command, cwd=folder.parent, check=False).returncode)
    console = Console(highlight=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = Table(title=f"Forward and backward, float32 on {device}, {torch.get_num_threads()} threads")
    for column in ("operation", "shape"):
        table.add_column(column)
    for column in ("stock ms", "fasttune ms", "times faster"):
        table.add_column(column, justify="right")
    for name, shape, stock, ours in _comparisons(device):
        with console.status(f"{name} {shape}"):
            stock_ms, ours_ms, ratio = _interleaved(stock, ours, device)
        table.add_row(name, shape, f"{stock_ms:.1f}", f"{ours_ms:.1f}", f"{ratio:.2f}")
    console.print(table)


Step = Callable[[], object]


def _comparisons(device: str, scale: int = 1) -> list[tuple[str, str, Step, Step]]:
    """(operation, shape, stock step, our step); each step is one forward and backward. scale: divides the rows."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, requires_grad=True)

    def step(function: Callable[[], torch.Tensor], *leaves: torch.Tensor) -> Step:
        upstream = torch.randn_like(function())
        return lambda: torch.autograd.grad(function(), leaves, upstream)

    rows, length = 2048 // scale, 256 // scale
    x, residual, weight, bias = leaf(rows, 768), leaf(rows, 768), leaf(768), leaf(768)
    wide, wide_bias = leaf(rows, 3072), leaf(3072)
    query, key, value = (leaf(4, length, 12, 64) for _ in range(3))

    def stock_norm() -> torch.Tensor:
        return F.layer_norm(F.dropout(x, 0.1) + residual, (768,), weight, bias)

    def stock_attention() -> torch.Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1).transpose(1, 2)

    return [
        (
            "dropout_add_layer_norm",
            f"{rows} x 768, dropout 0.1",
            step(stock_norm, x, residual, weight, bias),
            step(
                lambda: ops.dropout_add_layer_norm(x, residual, weight, bias, dropout_p=0.1), x, residual, weight, bias
            ),
        ),
        (
            "bias_gelu",
            f"{rows} x 3072, tanh",
            step(lambda: F.gelu(wide + wide_bias, approximate="tanh"), wide, wide_bias),
            step(lambda: ops.bias_gelu(wide, wide_bias, approximate="tanh"), wide, wide_bias),
        ),
        (
            "attention",
            f"4 x {length}, 12 heads of 64, dropout 0.1",
            step(stock_attention, query, key, value),
            step(lambda: ops.attention(query, key, value, dropout_p=0.1), query, key, value),
        ),
    ]


def _interleaved(stock: Step, ours: Step, device: str, pairs: int = 15) -> tuple[float, float, float]:
    """Medians in milliseconds, and the median of the ratios within pairs."""

    def timed(step: Step) -> float:
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    for _ in range(3):
        timed(stock)
        timed(ours)
    measured = [(timed(stock), timed(ours)) for _ in range(pairs)]
    stock_ms, ours_ms = (statistics.median(times) for times in zip(*measured, strict=True))
    return stock_ms, ours_ms, statistics.median(a / b for a, b in measured)


# ------------------------------------------------------------------------------------------------------------- verify


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A folder that save_pretrained wrote, or a name on the hub.")],
    batches: Annotated[
        Path, typer.Argument(help="A dict of tensors, or a list of dicts, by torch.save; or one batch as .safetensors.")
    ],
    auto_class: str = typer.Option(
        "", "--class", help="The class of Transformers to load, AutoModelForMaskedLM say; else config.architectures."
    ),
    dtype: str = typer.Option("", help="float32, bfloat16 or float16; else as it was saved."),
    device: str = typer.Option("", help="cpu, cuda or cuda:1; else cuda where there is one."),
    packing: str = typer.Option("auto", help="true, false or auto."),
    trim: str = typer.Option("auto", help="true, false or auto."),
    backend: str = typer.Option("auto", help="cpp, triton, cuda, torch or auto."),
    repeats: int = typer.Option(5, min=0, help="Pairs of steps to time."),
    dropout: int = typer.Option(0, min=0, help="Steps with dropout to compare the mean loss and gradient norm of."),
) -> None:
    """Compares a model's training step on your batches with stock: loss, outputs, every gradient, time. Exit code 1 if
    a value is beyond its bound."""
    options: dict[str, Any] = {"packing": _switch("packing", packing), "trim": _switch("trim", trim)}
    read = _batches(batches)
    loaded = _load(model, auto_class, dtype).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    place = next(loaded.parameters()).device
    console = Console(highlight=False, markup=False)
    failed = 0
    for number, batch in enumerate(read):
        batch = {name: value.to(place) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        try:
            with console.status(f"batch {number + 1} of {len(read)}"):
                found = verification.verify(loaded, batch, dropout=dropout, repeats=repeats, backend=backend, **options)
        except (TypeError, ValueError) as error:
            raise typer.BadParameter(f"batch {number + 1} of {batches}: {error}") from error
        if len(read) > 1:
            console.print(f"batch {number + 1} of {len(read)}")
        print(found)
        failed += not found
    if len(read) > 1:
        console.print(f"{failed} of {len(read)} batches are beyond their bounds." if failed else "All batches agree.")
    raise typer.Exit(1 if failed else 0)


def _switch(name: str, value: str) -> bool | str:
    words: dict[str, bool | str] = {"true": True, "false": False, "auto": "auto"}
    if value.lower() not in words:
        raise typer.BadParameter(f"--{name} is {value!r}; expected true, false or auto.")
    return words[value.lower()]


def _batches(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise typer.BadParameter(f"BATCHES is {path}; expected a file, and there is none.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return [load_file(path)]
    try:
        read = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        said = str(error).strip().splitlines()
        raise typer.BadParameter(
            f"BATCHES is {path}, which torch.load(weights_only=True) does not read ({said[0] if said else error!r})."
            " Expected what torch.save(dict(batch), path) or torch.save([dict(batch), ...], path) writes."
        ) from error
    listed = read if isinstance(read, (list, tuple)) else [read]
    if not listed or not all(isinstance(batch, dict) for batch in listed):
        what = "an empty list" if not listed else f"a {type(read).__name__} of {type(listed[0]).__name__}"
        raise typer.BadParameter(
            f"BATCHES is {path}, which holds {what}; expected a dict of tensors or a list of dicts."
        )
    return list(listed)


def _load(model: str, auto_class: str, dtype: str) -> torch.nn.Module:
    if importlib.util.find_spec("transformers") is None:
        raise typer.BadParameter("verify needs Hugging Face Transformers: pip install 'transformers>=5.17'.")
    import transformers

    options = {}
    if dtype:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise typer.BadParameter(f"--dtype is {dtype!r}; expected float32, bfloat16 or float16.")
        options["dtype"] = getattr(torch, dtype)
    try:
        name = auto_class or next(iter(transformers.AutoConfig.from_pretrained(model).architectures or ()), "")
        cls = getattr(transformers, name, None) if name else None
        if cls is None or not hasattr(cls, "from_pretrained"):
            found = f"the class {name!r}, which Transformers lacks" if name else "no class named in its config"
            raise typer.BadParameter(f"MODEL is {model}, with {found}; expected --class AutoModelForMaskedLM, say.")
        return cls.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"MODEL is {model}, which Transformers does not load: {error}") from error
