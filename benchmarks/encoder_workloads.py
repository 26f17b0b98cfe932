"""Training steps of the encoders that are not BERT under another name, on padded batches.

Configurations are the checkpoints' own (distilbert-base-uncased, albert-base-v2, mpnet-base, deberta-v3-base,
ModernBERT-base, esm2_t12_35M_UR50D);
the layers that count as needed are those of `needed.py`: of a window, the pairs that it lets through.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from batches import Batch
from padding_workloads import filled, padded_step
from transformers import AlbertConfig, DebertaV2Config, DistilBertConfig, EsmConfig, ModernBertConfig, MPNetConfig

_DEBERTA_V3 = {
    "relative_attention": True,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
}


def _configs(quick: bool) -> dict[str, Any]:
    if quick:
        small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
        small |= {"intermediate_size": 64, "max_position_embeddings": 32, "pad_token_id": 0}
        special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
        return {
            "distilbert": DistilBertConfig(
                vocab_size=97, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=32
            ),
            "albert": AlbertConfig(**small, embedding_size=16),
            "mpnet": MPNetConfig(**small),
            "deberta": DebertaV2Config(**small, **_DEBERTA_V3, position_buckets=4),
            "modernbert": ModernBertConfig(**small, **special, local_attention=8),
            "esm": EsmConfig(**small, position_embedding_type="rotary", token_dropout=True, mask_token_id=3),
        }
    return {
        "distilbert": DistilBertConfig(),
        "albert": AlbertConfig(  # albert-base-v2
            hidden_size=768, num_attention_heads=12, intermediate_size=3072, hidden_act="gelu_new"
        ),
        "mpnet": MPNetConfig(),
        "deberta": DebertaV2Config(  # deberta-v3-base
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            intermediate_size=3072,
            position_buckets=256,
            **_DEBERTA_V3,
        ),
        "modernbert": ModernBertConfig(),
        "esm": EsmConfig(  # esm2_t12_35M_UR50D
            vocab_size=33,
            hidden_size=480,
            num_hidden_layers=12,
            num_attention_heads=20,
            intermediate_size=1920,
            max_position_embeddings=1026,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            layer_norm_eps=1e-5,
            position_embedding_type="rotary",
            emb_layer_norm_before=False,
            token_dropout=True,
            pad_token_id=1,
            mask_token_id=32,
        ),
    }


def workloads(quick: bool) -> dict[str, Any]:
    """Every row by name, not built yet."""
    config = _configs(quick)
    short = filled(0.67, 3, 17) if quick else filled(0.67, 16, 128)
    masked = replace(filled(0.61, 3, 19) if quick else filled(0.61, 4, 512), label_ratio=0.15)
    proteins = replace(filled(0.54, 3, 19) if quick else filled(0.54, 8, 512), label_ratio=0.15)
    long = Batch.full(2, 17) if quick else Batch.full(4, 512)
    rows = {
        "distilbert-base-classification": ("DistilBERT-base", config["distilbert"], "classification", short),
        "albert-base-classification": ("ALBERT-base", config["albert"], "classification", short),
        "mpnet-base-classification": ("MPNet-base", config["mpnet"], "classification", short),
        "deberta-v3-base-classification": ("DeBERTa-v3-base", config["deberta"], "classification", short),
        "deberta-v3-base-full": ("DeBERTa-v3-base", config["deberta"], "classification", long),
        "modernbert-base-classification": ("ModernBERT-base", config["modernbert"], "classification", short),
        "modernbert-base-mlm": ("ModernBERT-base MLM", config["modernbert"], "mlm", masked),
        "esm2-35m-mlm": ("ESM-2 35M MLM", config["esm"], "mlm", proteins),
    }
    return {name: partial(padded_step, *row) for name, row in rows.items()}
