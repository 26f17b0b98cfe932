"""Supervised fine-tuning with TRL: a small GPT-2 learns to continue the Python language reference from its topic.

    python examples/sft_gpt2_trl.py               # stock, then with fasttune: time and loss of both
    python examples/sft_gpt2_trl.py --side fasttune
    python examples/sft_gpt2_trl.py --model gpt2 --lr 5e-5

The loss is that of the completion alone. By default everything is at hand: the text ships with Python, the tokenizer is
trained on it on the spot, and the model begins from nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence

import finetune_gpt2
from datasets import Dataset
from python_text import language_reference
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

import fasttune

SIDES = ("stock", "fasttune")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scratch", help="a folder, a hub name, or scratch: a new small GPT-2")
    parser.add_argument("--side", choices=[*SIDES, "both"], default="both")
    parser.add_argument("--layers", type=int, default=4, help="of a model from scratch")
    parser.add_argument("--width", type=int, default=256, help="of a model from scratch; heads are 64 wide")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of a model from scratch")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="most tokens of an example")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.device, args.patch = "cpu", False  # of finetune_gpt2
    return args


def examples(texts: Sequence[str]) -> Dataset:
    """Of each passage the first paragraph is the prompt, the rest the completion."""
    parts = [text.split("\n\n", 1) for text in texts]
    parts = [(prompt, rest) for prompt, rest in (part for part in parts if len(part) == 2) if rest.strip()]
    return Dataset.from_dict({"prompt": [a + "\n\n" for a, _ in parts], "completion": [b for _, b in parts]})


def trained(
    side: str, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, train: Dataset, held_out: Dataset
) -> tuple[float, float, float]:
    """(seconds of training, held-out loss before, after)."""
    model = finetune_gpt2.load_model(tokenizer, args)
    if side == "fasttune":
        fasttune.patch(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                per_device_eval_batch_size=args.batch_size,
                max_length=args.length,
                learning_rate=args.lr,
                warmup_steps=args.steps // 10,
                completion_only_loss=True,
                gradient_checkpointing=False,
                bf16=False,
                seed=args.seed,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )
        before = trainer.evaluate()["eval_loss"]
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        return seconds, before, trainer.evaluate()["eval_loss"]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    train, held_out = language_reference()
    tokenizer = finetune_gpt2.load_tokenizer(train, args)
    data, measure = examples(train), examples(held_out)
    print(f"{len(data)} passages to train on, {len(measure)} held out")
    for side in SIDES if args.side == "both" else (args.side,):
        seconds, before, after = trained(side, args, tokenizer, data, measure)
        print(f"{side:9} {args.steps} steps in {seconds:.1f} s, held-out loss before {before:.3f}, after {after:.3f}")


if __name__ == "__main__":
    main()
