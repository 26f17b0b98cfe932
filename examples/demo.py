"""Stock Transformers and fasttune side by side: a BERT and a GPT-2, each trained twice from the same seed.

    python examples/demo.py

Both sides take every step on the same batch, one straight after the other in one process, so that whatever else the
machine does hits both. The end is a table for each model, and out/demo.png: loss against wall-clock time.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is at hand

import finetune_bert
import finetune_gpt2
import torch
import transformers
from python_text import PACKAGES, docstring_examples, language_reference
from rich.console import Console
from rich.panel import Panel
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from side_by_side import Side, loss_differences, peak_memory, plot, take_turns

import fasttune

PARITY_STEPS = 4
NAMES = ("stock", "fasttune")

console = Console()


@dataclass
class Task:
    """One model and its data: what both sides share."""

    name: str
    model: str
    data: str
    metric: str
    batches: list[Any]
    no_dropout: dict[str, float]
    load: Callable[..., Side]  # load(patch, **config)
    evaluate: Callable[[Any], float]
    show: Callable[[float], str]
    count_tokens: Callable[[Any], int]  # padding is not counted
    widest: Callable[[Any], int]
    sample: Callable[[Any], str] | None = None


def _with_patch(args: argparse.Namespace, patch: bool) -> argparse.Namespace:
    args = copy.copy(args)
    args.patch = patch
    return args


def bert_task(steps: int) -> Task:
    args = finetune_bert.parse_args(["--device", "cpu", "--steps", str(steps)])
    train, held_out = docstring_examples()
    tokenizer = finetune_bert.load_tokenizer(args)

    def load(patch: bool, **config: float) -> Side:
        model = finetune_bert.load_model(_with_patch(args, patch), **config)
        return Side(model, *finetune_bert.make_optimizer(model, args), finetune_bert.train_step, args.seed)

    return Task(
        name="bert",
        model="BERT (MiniLM, 6 layers of 384, pretrained)",
        data=f"{len(train)} docstrings of {len(PACKAGES)} packages, {args.batch_size} a step, natural lengths",
        metric="accuracy",
        batches=list(finetune_bert.training_batches(train, tokenizer, args)),
        no_dropout={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        load=load,
        evaluate=lambda model: finetune_bert.accuracy(model, held_out, tokenizer, args),
        show=lambda value: f"{value:.1%}",
        count_tokens=lambda batch: int(batch["attention_mask"].sum()),
        widest=lambda batch: batch["input_ids"].shape[1],
    )


def gpt2_task(steps: int) -> Task:
    args = finetune_gpt2.parse_args(["--device", "cpu", "--steps", str(steps)])
    train, held_out = language_reference()
    tokenizer = finetune_gpt2.load_tokenizer(train, args)
    stream, held_out_stream = (finetune_gpt2.token_stream(texts, tokenizer) for texts in (train, held_out))

    def load(patch: bool, **config: float) -> Side:
        model = finetune_gpt2.load_model(tokenizer, _with_patch(args, patch), **config)
        return Side(model, *finetune_gpt2.make_optimizer(model, args), finetune_gpt2.train_step, args.seed)

    return Task(
        name="gpt2",
        model=f"GPT-2 ({args.layers} layers of {args.width}, from scratch)",
        data=f"Python language reference, {len(stream)} tokens, {args.batch_size} x {args.length} a step",
        metric="perplexity",
        batches=list(finetune_gpt2.training_batches(stream, args)),
        no_dropout={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        load=load,
        evaluate=lambda model: finetune_gpt2.perplexity(model, held_out_stream, args),
        show=lambda value: f"{value:.1f}",
        count_tokens=lambda batch: batch.numel(),
        widest=lambda batch: batch.shape[1],
        sample=lambda model: finetune_gpt2.sample(model, tokenizer, args),
    )


TASKS = {"bert": bert_task, "gpt2": gpt2_task}


def probe_memory(task: Task, patch: bool) -> int:
    """Peak memory of this process after three steps on the widest batches of the task."""
    side = task.load(patch)
    for batch in sorted(task.batches, key=task.widest)[-3:]:
        side.step(batch)
    return peak_memory()


def memory_in_own_process(name: str, patch: bool) -> int:
    command = [sys.executable, __file__, "--probe", name, "--patch" if patch else "--no-patch"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def compare(name: str, steps: int, progress: Progress) -> dict[str, Any]:
    """Trains both sides and returns everything the table and the plot show."""
    bar = progress.add_task(f"{name}: peak memory, each side in its own process", total=2 + PARITY_STEPS + steps + 4)

    def describe(what: str) -> None:
        progress.update(bar, description=f"{name}: {what}")

    memory = []
    for patch in (False, True):
        memory.append(memory_in_own_process(name, patch))
        progress.advance(bar)

    task = TASKS[name](steps)
    describe("parity, dropout off")
    sides = [task.load(patch, **task.no_dropout) for patch in (False, True)]
    batches = (task.batches * PARITY_STEPS)[:PARITY_STEPS]
    parity = loss_differences(*sides, batches, lambda: progress.advance(bar))

    sides = [task.load(patch) for patch in (False, True)]
    report = str(fasttune.report(sides[1].model))
    before, after = [], []
    for values, what in ((before, "before"), (after, "after")):
        if what == "after":
            describe("training, dropout on, taking turns")
            for _ in take_turns(*sides, task.batches):
                progress.advance(bar)
        describe(f"{task.metric} {what}")
        for side in sides:
            values.append(task.evaluate(side.model))
            progress.advance(bar)
    tokens = sum(map(task.count_tokens, task.batches))
    return {
        "name": name,
        "model": task.model,
        "data": task.data,
        "metric": task.metric,
        "report": report,
        "steps": steps,
        "seconds": [side.seconds for side in sides],
        "losses": [side.losses for side in sides],
        "speedup": median(a / b for a, b in zip(sides[0].seconds, sides[1].seconds, strict=True)),
        "tokens_per_second": [tokens / sum(side.seconds) for side in sides],
        "memory": memory,
        "before": [task.show(value) for value in before],
        "after": [task.show(value) for value in after],
        "parity": parity,
        "samples": [task.sample(side.model) for side in sides] if task.sample else [],
    }


def table(result: dict[str, Any]) -> Table:
    out = Table(title=f"[bold]{result['model']}[/]\n{result['data']}, {result['steps']} steps", title_style="")
    out.add_column("")
    for heading in (*NAMES, ""):
        out.add_column(heading, justify="right")
    step, speed = [median(seconds) for seconds in result["seconds"]], result["tokens_per_second"]
    out.add_row("step time, median", *(f"{x * 1e3:.0f} ms" for x in step), f"[bold]{result['speedup']:.2f}× faster[/]")
    out.add_row("tokens/s (no padding counted)", *(f"{x:,.0f}" for x in speed), f"{speed[1] / speed[0]:.2f}×")
    memory = [x / 2**20 for x in result["memory"]]
    out.add_row("peak memory of the process", *(f"{x:,.0f} MiB" for x in memory), f"{memory[1] - memory[0]:+,.0f} MiB")
    last = [mean(losses[-10:]) for losses in result["losses"]]
    out.add_row("loss, last 10 steps", *(f"{x:.3f}" for x in last), "other dropout masks")
    out.add_row(f"held-out {result['metric']} before", *result["before"], "")
    out.add_row(f"held-out {result['metric']} after", *result["after"], "")
    out.add_section()
    first, largest = result["parity"][0], max(result["parity"])
    out.add_row("loss difference, dropout off", "step 1", f"{first:.1e}", "")
    out.add_row("", f"steps 1-{len(result['parity'])}", f"{largest:.1e}", "largest")
    return out


def panel(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": result["model"].partition(" (")[0],
        "subtitle": f"{result['model'].partition(' (')[2].rstrip(')')}; {result['steps']} steps, same batches",
        "speedup": result["speedup"],
        "curves": dict(zip(NAMES, zip(result["seconds"], result["losses"], strict=True), strict=True)),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bert-steps", type=int, default=40, help="0 leaves BERT out")
    parser.add_argument("--gpt2-steps", type=int, default=100, help="0 leaves GPT-2 out")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for demo.png and demo.json")
    parser.add_argument("--probe", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--patch", action=argparse.BooleanOptionalAction, default=True, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.probe:
        print(probe_memory(TASKS[args.probe](50), args.patch))
        return

    started = time.perf_counter()
    console.print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads"
    )
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    results = []
    for name, steps in (("bert", args.bert_steps), ("gpt2", args.gpt2_steps)):
        if steps == 0:
            continue
        with Progress(*columns, console=console) as progress:
            results.append(compare(name, steps, progress))
        console.print(Text(results[-1]["report"]))
    for result in results:
        console.print()
        console.print(table(result))
        for side, text in zip(NAMES, result["samples"], strict=False):
            lines = [line for line in text.splitlines() if line.strip()]  # so small a model loves the empty line
            console.print(Panel(Text("\n".join(lines)), title=f"{side} continues", width=100))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "demo.json").write_text(json.dumps(results, indent=1))
    plot(args.out / "demo.png", [panel(result) for result in results])
    console.print(
        f"\n{args.out / 'demo.png'}: loss against time. All of it took {time.perf_counter() - started:.0f} s."
    )


if __name__ == "__main__":
    main()
