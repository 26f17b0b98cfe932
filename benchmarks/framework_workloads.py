"""Training steps and inference in the frameworks where encoders and GPT-2 are fine-tuned: sentence-transformers, TRL,
Trainer's label smoothing, encoder-decoders.

Every side does what the framework's trainer does in a step, from the collated batch to the optimizer; rerankers
tokenize inside of their loss, as stock does. Weights are random, texts are of random words, each one token.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import encoder_workloads
import step_workloads
import torch
from batches import Batch
from padding_workloads import Answers, filled
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder import losses as cross_losses
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder import losses as sparse_losses
from sentence_transformers.sparse_encoder.modules import SpladePooling
from transformers import (
    AutoModel,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertTokenizerFast,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2LMHeadModel,
)
from transformers.trainer_pt_utils import LabelSmoother
from workload import OURS, Step, Workload

import fasttune

STOCK = ("stock sdpa", "stock eager")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@cache
def _folder(architecture: type, name: str, quick: bool) -> str:
    return _folder_of(architecture, copy.deepcopy(step_workloads._configs(quick)[name]))


def _folder_of(architecture: Any, config: Any) -> str:
    """A saved model of random weights with a tokenizer of made-up words."""
    config.num_labels = 1
    config.max_position_embeddings = 512
    folder = tempfile.mkdtemp()
    words = [*SPECIAL, *(f"w{number}" for number in range(config.vocab_size - len(SPECIAL)))]
    vocabulary = Path(folder, "vocab.txt")
    vocabulary.write_text("\n".join(words) + "\n")
    torch.manual_seed(0)
    architecture(config).save_pretrained(folder)
    BertTokenizerFast(str(vocabulary), model_max_length=512).save_pretrained(folder)
    return folder


def texts(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[str]:
    drawn = random.Random(seed)
    known = vocabulary - len(SPECIAL)
    return [" ".join(f"w{drawn.randrange(known)}" for _ in range(length)) for length in lengths]


@dataclass(frozen=True)
class Pairs:
    """queries: words of each query. documents: words of each document."""

    queries: tuple[int, ...]
    documents: tuple[int, ...]

    @classmethod
    def of(cls, batch: Batch, query: int) -> Pairs:
        return cls((query,) * len(batch.lengths), batch.lengths)

    def __str__(self) -> str:
        return f"{len(self.queries)} pairs of {max(self.queries)} and {Batch(self.documents)}".replace(" x ", " × ")

    def columns(self, vocabulary: int) -> list[list[str]]:
        return [texts(self.queries, vocabulary, 1), texts(self.documents, vocabulary, 2)]


def _attention(side: str) -> str:
    return "eager" if side == "stock eager" else "sdpa"


def _stepper(parameters: Any, loss: Callable[[], torch.Tensor]) -> Step:
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


def _embedder(side: str, folder: str, eager_alone: bool = False) -> SentenceTransformer:
    settings = {} if eager_alone else {"attn_implementation": _attention(side)}
    transformer = Transformer(folder, model_kwargs=settings)
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


def _patched(side: str, model: Any) -> Any:
    return fasttune.patch(model) if side == OURS else model


def _bi_encoder(side: str, folder: str, pairs: Pairs, cached: bool, eager_alone: bool = False) -> Step:
    model = _patched(side, _embedder(side, folder, eager_alone)).train()
    features = [model.preprocess(column) for column in pairs.columns(len(model.tokenizer))]
    if cached:
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=32)
    else:
        loss = losses.MultipleNegativesRankingLoss(model)
    return _stepper(model.parameters(), lambda: loss([dict(column) for column in features], None))


def _reranker(side: str, folder: str, pairs: Pairs) -> Step:
    model = CrossEncoder(folder, num_labels=1, device="cpu", model_kwargs={"attn_implementation": _attention(side)})
    _patched(side, model).train()
    columns = pairs.columns(len(model.tokenizer))
    labels = (torch.arange(len(pairs.queries)) % 2).float()
    loss = cross_losses.BinaryCrossEntropyLoss(model)
    return _stepper(model.parameters(), lambda: loss(columns, labels))


def _splade(side: str, folder: str, pairs: Pairs) -> Step:
    options = {"attn_implementation": _attention(side)}
    transformer = Transformer(folder, transformer_task="fill-mask", model_kwargs=options)
    model = SparseEncoder(modules=[transformer, SpladePooling("max")], device="cpu")
    _patched(side, model).train()
    features = [model.preprocess(column) for column in pairs.columns(len(model.tokenizer))]
    ranking = sparse_losses.SparseMultipleNegativesRankingLoss(model)
    loss = sparse_losses.SpladeLoss(model, ranking, document_regularizer_weight=3e-5, query_regularizer_weight=5e-5)

    def total() -> torch.Tensor:
        found = loss([dict(column) for column in features], None)
        return sum(found.values()) if isinstance(found, dict) else found

    return _stepper(model.parameters(), total)


def _encoding(side: str, folder: str, lengths: tuple[int, ...], order: str) -> Step:
    model = _patched(side, _embedder(side, folder)).eval()
    sentences = texts(lengths, len(model.tokenizer))
    if order == "sorted":
        return lambda: model.encode(sentences, batch_size=32, show_progress_bar=False)

    def step() -> None:
        for begin in range(0, len(sentences), 32):
            model.encode(sentences[begin : begin + 32], batch_size=32, show_progress_bar=False)

    return step


def _smoothed(side: str, architecture: Any, config: Any, inputs: dict[str, torch.Tensor], epsilon: float) -> Step:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config._attn_implementation = _attention(side)
    model = _patched(side, architecture(config)).train()
    causal = architecture is GPT2LMHeadModel
    smoother = LabelSmoother(epsilon=epsilon)
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    options = {"use_cache": False} if causal else {}

    def loss() -> torch.Tensor:
        if epsilon == 0.0:
            return model(**inputs, **options).loss
        return smoother(model(**rest, **options), inputs["labels"], shift_labels=causal)

    return _stepper(model.parameters(), loss)


def _translation(side: str, config: Any, source: Batch, target: Batch) -> Step:
    torch.manual_seed(0)
    encoder, decoder = copy.deepcopy(config), copy.deepcopy(config)
    both = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    both.decoder_start_token_id, both.pad_token_id = 1, 0
    model = EncoderDecoderModel(config=both)
    model.set_attn_implementation(_attention(side))
    _patched(side, model).train()
    inputs = {"input_ids": source.tokens(config.vocab_size), "attention_mask": source.mask()}
    inputs["labels"] = target.token_labels(target.tokens(config.vocab_size))
    return _stepper(model.parameters(), lambda: model(**inputs, use_cache=False).loss)


def _trl_inputs(batch: Batch, vocabulary: int) -> dict[str, torch.Tensor]:
    return batch.inputs(vocabulary, "lm")


def _trl(kind: str, side: str, config: Any, batch: Batch) -> Step:
    """What TRL's SFT and DPO trainers compute in a step."""
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config._attn_implementation = _attention(side)
    model = GPT2LMHeadModel(config)
    reference = copy.deepcopy(model).eval()
    _patched(side, model).train()
    outputs = ("log_probs", "entropy", "is_top1") if kind == "sft" else ("log_probs", "mean_logits", "is_top1")
    add_fused_lm_head(model, outputs=outputs)
    inputs = batch.inputs(config.vocab_size, "lm")
    if kind == "sft":

        def loss() -> torch.Tensor:
            found = model(**inputs, fused_lm_head=True, use_cache=False)
            with torch.no_grad():
                mask = found.label_mask
                (found.entropy * mask).sum() / mask.sum(), (found.is_top1 * mask).sum() / mask.sum()
            return found.loss

        return _stepper(model.parameters(), loss)
    add_fused_lm_head(_patched(side, reference), outputs=("log_probs",))

    def preference() -> torch.Tensor:
        found = model(**inputs, fused_lm_head=True, use_cache=False).log_probs.sum(1)
        with torch.no_grad():
            theirs = reference(**inputs, fused_lm_head=True, use_cache=False).log_probs.sum(1)
        chosen, rejected = (found - theirs).chunk(2)
        return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()

    return _stepper(model.parameters(), preference)


def _row(shape: str, side: Callable[[str], Step], names: tuple[str, ...] = (OURS, *STOCK), **notes: Any) -> Workload:
    return Workload(
        group="in a framework",
        shape=shape,
        dtype="float32",
        sides={name: partial(side, name) for name in names},
        notes=notes,
    )


def workloads(quick: bool) -> dict[str, Callable[[], Workload]]:
    """Every row by name, not built yet."""
    config = step_workloads._configs(quick)
    count, longest, query = (4, 17, 3) if quick else (32, 160, 12)
    ragged = Pairs.of(Batch.ragged(count, 2 if quick else 20, longest), query)
    short = Pairs.of(filled(0.37, count, longest), query)
    many = Pairs.of(Batch.ragged(8 * count, 2 if quick else 20, longest), query)
    sparse = Pairs.of(Batch.ragged(*((3, 2, 17) if quick else (16, 8, 128))), query)
    drawn = random.Random(0)
    lengths = tuple(drawn.randint(*((2, 20) if quick else (5, 200))) for _ in range(40 if quick else 1000))
    mlm = Batch.ragged(*((3, 3, 17) if quick else (16, 20, 128)), label_ratio=0.15)
    tags = Batch.ragged(*((3, 3, 17) if quick else (16, 20, 128)))
    answers = Answers.ragged(*((2, 5, 19) if quick else (4, 100, 512)))
    source = filled(0.6, *((3, 17) if quick else (8, 256)))
    target = Batch.full(*((3, 9) if quick else (8, 64)))
    bert, gpt2 = config["bert"], config["gpt2"]

    def folder(architecture: type, name: str) -> str:
        return _folder(architecture, name, quick)

    def embeddings(pairs: Pairs, cached: bool = False) -> Workload:
        label = "CachedMultipleNegativesRanking" if cached else "MultipleNegativesRanking"
        side = partial(_bi_encoder, folder=folder(AutoModel.from_config, "minilm"), pairs=pairs, cached=cached)
        return _row(f"MiniLM-6 bi-encoder, {label}, {pairs}", side)

    def mpnet() -> Workload:
        batch = filled(0.67, *((3, 17) if quick else (16, 128)))
        pairs = Pairs(batch.lengths, batch.lengths)
        settings = encoder_workloads._configs(quick)["mpnet"]
        where = _folder_of(AutoModel.from_config, settings)
        side = partial(_bi_encoder, folder=where, pairs=pairs, cached=False, eager_alone=True)
        return _row(f"MPNet-base bi-encoder, MultipleNegativesRanking, {pairs}", side, (OURS, "stock eager"))

    def reranker() -> Workload:
        side = partial(_reranker, folder=folder(BertForSequenceClassification, "minilm"), pairs=ragged)
        return _row(f"MiniLM-6 CrossEncoder, BinaryCrossEntropy, {ragged}", side)

    def splade() -> Workload:
        side = partial(_splade, folder=folder(BertForMaskedLM, "bert"), pairs=sparse)
        return _row(f"BERT-base SPLADE, {sparse}", side)

    def encoding(order: str) -> Workload:
        side = partial(_encoding, folder=folder(AutoModel.from_config, "minilm"), lengths=lengths, order=order)
        label = f"MiniLM-6 encode, {len(lengths)} texts of {min(lengths)}–{max(lengths)} words, {order}"
        return _row(label, side)

    def smoothing(name: str, architecture: Any, settings: Any, batch: Batch, epsilon: float) -> Workload:
        inputs = batch.inputs(settings.vocab_size, "lm")
        if architecture is BertForTokenClassification:
            inputs["labels"] = inputs["labels"].where(inputs["labels"] < 0, inputs["labels"] % settings.num_labels)
        side = partial(_smoothed, architecture=architecture, config=settings, inputs=inputs, epsilon=epsilon)
        return _row(f"{name}, label smoothing {epsilon}, {batch}", side)

    tagger = copy.deepcopy(bert)
    tagger.num_labels = 9
    rows: dict[str, Callable[[], Workload]] = {
        "bi-encoder": partial(embeddings, ragged),
        "bi-encoder-short": partial(embeddings, short),
        "bi-encoder-cached": partial(embeddings, many, cached=True),
        "mpnet-bi-encoder": mpnet,
        "cross-encoder": reranker,
        "splade": splade,
        "encode-sorted": partial(encoding, "sorted"),
        "encode-unsorted": partial(encoding, "unsorted"),
        "bert2bert": lambda: _row(
            f"BERT2BERT, {source}, decoder {target}", partial(_translation, config=bert, source=source, target=target)
        ),
        "trl-sft": lambda: _row(f"TRL SFT GPT-2 124M, {answers}", partial(_trl, "sft", config=gpt2, batch=answers)),
        "trl-dpo": lambda: _row(f"TRL DPO GPT-2 124M, {answers}", partial(_trl, "dpo", config=gpt2, batch=answers)),
    }
    for epsilon in (0.0, 0.1):
        rows[f"smoothing-{epsilon}-mlm"] = partial(smoothing, "BERT-base MLM", BertForMaskedLM, bert, mlm, epsilon)
        rows[f"smoothing-{epsilon}-tokens"] = partial(
            smoothing, "BERT-base token classification", BertForTokenClassification, tagger, tags, epsilon
        )
        rows[f"smoothing-{epsilon}-causal"] = partial(smoothing, "GPT-2 124M", GPT2LMHeadModel, gpt2, answers, epsilon)
    return rows
