"""Train a small GPT-2 from scratch on the Python language reference, or fine-tune one from the hub.

    python examples/finetune_gpt2.py                # with fasttune
    python examples/finetune_gpt2.py --no-patch     # stock Transformers
    python examples/finetune_gpt2.py --model gpt2 --lr 5e-5

By default everything is at hand: the text ships with Python, and the tokenizer is trained on it on the spot.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence

import torch
from python_text import language_reference
from rich.progress import track
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

import fasttune

END = "<|endoftext|>"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scratch", help="a folder, a hub name, or scratch: a new small GPT-2")
    parser.add_argument("--patch", action=argparse.BooleanOptionalAction, default=True, help="use fasttune")
    parser.add_argument("--layers", type=int, default=4, help="of a model from scratch")
    parser.add_argument("--width", type=int, default=256, help="of a model from scratch; heads are 64 wide")
    parser.add_argument("--vocab-size", type=int, default=2048, help="of a model from scratch")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens in a training sequence")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--prompt", default='The "for" statement is used to')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def load_tokenizer(texts: Sequence[str], args: argparse.Namespace) -> PreTrainedTokenizerBase:
    if args.model != "scratch":
        return AutoTokenizer.from_pretrained(args.model)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=args.vocab_size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END)


def load_model(tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, **config: float) -> GPT2LMHeadModel:
    """The model; `config` overrides what its configuration says."""
    torch.manual_seed(args.seed)
    if args.model != "scratch":
        model = GPT2LMHeadModel.from_pretrained(args.model, **config)
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=args.length,
                n_embd=args.width,
                n_layer=args.layers,
                n_head=args.width // 64,
                bos_token_id=tokenizer.eos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                **config,
            )
        )
    model.to(args.device)
    if args.patch:
        fasttune.patch(model)
    return model


def token_stream(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """All texts as one row of tokens, each closed by the end-of-text token."""
    return torch.cat([torch.tensor(tokenizer(text + END, verbose=False)["input_ids"]) for text in texts])


def training_batches(stream: Tensor, args: argparse.Namespace) -> Iterator[Tensor]:
    """`args.steps` batches of token windows, (batch_size, length), that start anywhere in the stream."""
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.steps):
        starts = torch.randint(len(stream) - args.length, (args.batch_size,), generator=generator)
        yield torch.stack([stream[start : start + args.length] for start in starts]).to(args.device)


def make_optimizer(model: GPT2LMHeadModel, args: argparse.Namespace) -> tuple[torch.optim.AdamW, LRScheduler]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)


def train_step(
    model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, scheduler: LRScheduler, input_ids: Tensor
) -> float:
    model.train()
    optimizer.zero_grad(set_to_none=True)
    loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    return loss.item()


@torch.no_grad()
def perplexity(model: GPT2LMHeadModel, stream: Tensor, args: argparse.Namespace) -> float:
    """exp of the mean loss per token, over windows that do not overlap."""
    model.eval()
    windows = stream[: len(stream) // args.length * args.length].view(-1, args.length).to(args.device)
    total = 0.0
    for rows in windows.split(args.batch_size):
        total += model(input_ids=rows, labels=rows, use_cache=False).loss.item() * len(rows)
    return math.exp(total / len(windows))


def sample(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> str:
    model.eval()
    torch.manual_seed(args.seed)
    prompt = tokenizer(args.prompt, return_tensors="pt").to(args.device)
    tokens = model.generate(
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        max_new_tokens=60,
        do_sample=True,
        top_k=20,
        temperature=0.8,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    train, held_out = language_reference()
    tokenizer = load_tokenizer(train, args)
    train_stream, held_out_stream = token_stream(train, tokenizer), token_stream(held_out, tokenizer)
    model = load_model(tokenizer, args)
    optimizer, scheduler = make_optimizer(model, args)
    print(f"{len(train_stream)} tokens to train on, {len(held_out_stream)} held out, vocabulary of {len(tokenizer)}")
    print(f"perplexity before: {perplexity(model, held_out_stream, args):.1f}")
    torch.manual_seed(args.seed)
    started = time.perf_counter()
    batches = training_batches(train_stream, args)
    losses = [train_step(model, optimizer, scheduler, batch) for batch in track(batches, "training", args.steps)]
    print(f"{args.steps} steps in {time.perf_counter() - started:.1f} s, last loss {losses[-1]:.3f}")
    print(f"perplexity after: {perplexity(model, held_out_stream, args):.1f}")
    print(sample(model, tokenizer, args))


if __name__ == "__main__":
    main()
