"""Do models train to the same quality? Five seeds of four kinds of fine-tuning, stock and patched.

    python benchmarks/convergence.py --json benchmarks/results/convergence.json --page docs/convergence.md
    python benchmarks/convergence.py --only embeddings --seeds 2
    python benchmarks/convergence.py --from benchmarks/results/convergence.json --page docs/convergence.md

A seed decides the new weights, the order of the data and the dropout. Both sides start from the same weights and see
the same batches; dropout is on, and fasttune draws other masks than torch, so a patched run is another draw of the same
experiment. What is compared is therefore the metric on held-out data over the seeds. Everything comes from Python and
PyPI packages (the extra "dev"). Figures are written after each run, and those that the file holds already are not made
again; three quarters of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import machine
import torch
import transformers
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import finetune_bert
import finetune_embeddings
import finetune_gpt2
import python_text
import sft_gpt2_trl

import fasttune

SIDES = ("stock", "fasttune")


@dataclass(frozen=True)
class Run:
    task: str
    seed: int
    side: str
    before: float
    after: float


def classification(side: str, seed: int) -> tuple[float, float]:
    args = finetune_bert.parse_args(["--steps", "60", "--seed", str(seed)])
    args.patch = side == "fasttune"
    train, held_out = python_text.docstring_examples()
    tokenizer, model = finetune_bert.load_tokenizer(args), finetune_bert.load_model(args)
    optimizer, scheduler = finetune_bert.make_optimizer(model, args)
    before = finetune_bert.accuracy(model, held_out, tokenizer, args)
    for batch in finetune_bert.training_batches(train, tokenizer, args):
        finetune_bert.train_step(model, optimizer, scheduler, batch)
    return before, finetune_bert.accuracy(model, held_out, tokenizer, args)


def embeddings(side: str, seed: int) -> tuple[float, float]:
    args = finetune_embeddings.parse_args(["--seed", str(seed)])
    train, held_out = python_text.named_docstrings()
    return finetune_embeddings.trained(side, args, train, finetune_embeddings.evaluator(held_out))[1:]


def masked_lm(side: str, seed: int) -> tuple[float, float]:
    """The pretrained encoder with a new head, in Transformers' Trainer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(finetune_bert.model_path("minilm"))
    # Which tokens are masked must not depend on how many numbers dropout has drawn.
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=seed)
    rows = [
        [{"input_ids": ids} for ids in tokenizer([e.text for e in part], truncation=True, max_length=128)["input_ids"]]
        for part in python_text.docstring_examples()
    ]
    torch.manual_seed(seed)
    model = transformers.AutoModelForMaskedLM.from_pretrained(finetune_bert.model_path("minilm"))
    if side == "fasttune":
        fasttune.patch(model)
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=120,
            per_device_train_batch_size=16,
            learning_rate=5e-4,
            warmup_steps=12,
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, args, data_collator=collate, train_dataset=rows[0], eval_dataset=rows[1])

        def loss() -> float:
            collate.generator = None  # the same tokens are masked every time
            return float(trainer.evaluate()["eval_loss"])

        before = loss()
        torch.manual_seed(seed)
        trainer.train()
        return before, loss()


def sft(side: str, seed: int) -> tuple[float, float]:
    args = sft_gpt2_trl.parse_args(["--seed", str(seed)])
    tokenizer, train, held_out = _sft_data()
    return sft_gpt2_trl.trained(side, args, tokenizer, train, held_out)[1:]


@cache
def _sft_data() -> tuple[Any, Any, Any]:
    train, held_out = python_text.language_reference()
    tokenizer = finetune_gpt2.load_tokenizer(train, sft_gpt2_trl.parse_args([]))
    return tokenizer, sft_gpt2_trl.examples(train), sft_gpt2_trl.examples(held_out)


@dataclass(frozen=True)
class Task:
    train: Callable[[str, int], tuple[float, float]]
    what: str
    metric: str


TASKS = {
    "classification": Task(
        classification,
        "MiniLM-6, which package a docstring comes from, 60 steps of 16, own loop, AdamW (`examples/finetune_bert.py`)",
        "accuracy",
    ),
    "embeddings": Task(
        embeddings,
        "MiniLM-6, MultipleNegativesRankingLoss, 30 steps of 32 pairs, sentence-transformers"
        " (`examples/finetune_embeddings.py`)",
        "NDCG@10",
    ),
    "masked LM": Task(
        masked_lm,
        "MiniLM-6 with a new head, 15 % masked, 120 steps of 16, Transformers' Trainer",
        "held-out loss",
    ),
    "SFT": Task(
        sft,
        "GPT-2 of 4 layers from nothing, completions alone, 40 steps of 8, TRL (`examples/sft_gpt2_trl.py`)",
        "held-out loss",
    ),
}


def run(names: Sequence[str], seeds: int, runs: list[Run], save: Callable[[list[Run]], None]) -> None:
    """Adds to runs, and saves them, what they lack."""
    for name in names:
        for seed in range(seeds):
            for side in random.Random(seed).sample(SIDES, 2):
                if any((r.task, r.seed, r.side) == (name, seed, side) for r in runs):
                    continue
                runs.append(Run(name, seed, side, *TASKS[name].train(side, seed)))
                save(runs)
                print(f"{name:14} seed {seed} {side:8} {runs[-1].before:.4f} -> {runs[-1].after:.4f}", flush=True)


def page(facts: dict[str, Any], runs: Sequence[Run]) -> str:
    lines = [
        "# Convergence",
        "",
        "Written by `benchmarks/convergence.py`, which anyone can rerun; the figures of every run are in",
        "`benchmarks/results/convergence.json`. Both sides start from the same weights and see the same batches.",
        "Dropout is on, and fasttune draws other masks than torch, so each patched run is another draw of the same",
        "experiment: not equal to stock's, but with the same distribution of results.",
        "",
        f"{facts['processor']}, {facts['threads']} threads, fp32, torch {facts['torch']}, transformers"
        f" {facts['transformers']}, Python {facts['python']}.",
        "",
        "Metric after training, mean ± standard deviation over the seeds; *difference* is that of patched minus stock",
        "of the same seed, with its 95 % confidence interval (Student's t): where that contains 0, the data show none.",
        "",
        "| | seeds | metric | before | stock | patched | difference |",
        "| --- | --: | --- | --: | --: | --: | --: |",
    ]
    found = []
    for name, task in TASKS.items():
        sides = {side: sorted((r for r in runs if (r.task, r.side) == (name, side)), key=_seed) for side in SIDES}
        stock, ours = ([r.after for r in sides[side]] for side in SIDES)
        if len(stock) < 2 or len(stock) != len(ours):
            continue
        found.append(f"- **{name}**: {task.what}.")
        differences = [b - a for a, b in zip(stock, ours, strict=True)]
        interval = stats.ttest_rel(ours, stock).confidence_interval(0.95)
        lines.append(
            f"| {name} | {len(stock)} | {task.metric} | {mean(r.before for r in sides['stock']):.3f}"
            f" | {mean(stock):.4f} ± {stdev(stock):.4f} | {mean(ours):.4f} ± {stdev(ours):.4f}"
            f" | {mean(differences):+.4f} ({interval.low:+.4f} to {interval.high:+.4f}) |"
        )
    lines += ["", *found, "", "| | seed | stock | patched |", "| --- | --: | --: | --: |"]
    after = {(r.task, r.seed, r.side): r.after for r in runs}
    for name, seed in dict.fromkeys((r.task, r.seed) for r in runs if all((r.task, r.seed, s) in after for s in SIDES)):
        lines.append(f"| {name} | {seed} | {after[name, seed, 'stock']:.4f} | {after[name, seed, 'fasttune']:.4f} |")
    return "\n".join(lines) + "\n"


def _seed(run: Run) -> int:
    return run.seed


def _runs_of_before(file: Path | None) -> list[Run]:
    return [Run(**run) for run in json.loads(file.read_text())["runs"]] if file is not None and file.exists() else []


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*TASKS], action="append", help="a task; may be given again")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--page", type=Path, help="where the page goes")
    parser.add_argument("--from", type=Path, dest="source", help="figures of before, instead of training")
    args = parser.parse_args(argv)
    if args.source is not None:
        data = json.loads(args.source.read_text())
        facts, runs = data["machine"], [Run(**run) for run in data["runs"]]
    else:
        torch.set_num_threads(2)
        facts = {key: value for key, value in machine.describe().items() if key != "matmul_gflops"}
        runs = _runs_of_before(args.json)

        def save(runs: list[Run]) -> None:
            if args.json is not None:
                found = {"machine": facts, "runs": [asdict(run) for run in runs]}
                args.json.write_text(json.dumps(found, indent=1) + "\n")

        run(args.only or [*TASKS], args.seeds, runs, save)
    text = page(facts, runs)
    if args.page is not None:
        args.page.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
