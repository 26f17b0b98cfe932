"""Checkpoints by name: the configuration of each, in small, in the class that people load it as.

Small is few layers, two or three heads, a short vocabulary. What decides which code runs is the checkpoint's own: the
heads' dimension, the activation, epsilons, the padding id, what positions count from, the ratios of the widths.
Checkpoints that are the same in small share a case.
"""

import importlib.util
import inspect
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import CHECKPOINTS
from model_parity import check_models
from models import VOCABULARY, drawn

import fasttune
from fasttune.ops.attention import MAX_HEAD_DIM, MIN_HEAD_DIM

_MIDDLE = {"distilbert": "hidden_dim", "gpt2": "n_inner"}  # others: intermediate_size


def head_dim_of(config):
    return config.hidden_size // config.num_attention_heads


def small(checkpoint):
    """The checkpoint's configuration in small, as arguments of its class."""
    config = checkpoint.of_class()
    heads = 2 + config.num_attention_heads % 2
    width = heads * head_dim_of(config)
    of_width = width / config.hidden_size
    middle = _MIDDLE.get(checkpoint.model_type, "intermediate_size")
    sizes = {
        # ModernBERT's first layer sees everything, the two behind it a window.
        "num_hidden_layers": 3 if checkpoint.model_type == "modernbert" else 2,
        "num_attention_heads": heads,
        "hidden_size": width,
        middle: round(of_width * (getattr(config, middle) or 4 * config.hidden_size)),
        "vocab_size": VOCABULARY + 1,
        "max_position_embeddings": 48 + config.max_position_embeddings % 16,  # 2 more where they count from pad + 1
        "num_labels": 2 if checkpoint.loaded_as.endswith("QuestionAnswering") else 3,
    }
    if hasattr(config, "embedding_size"):
        sizes["embedding_size"] = max(8, round(of_width * config.embedding_size))
    if hasattr(config, "local_attention"):
        sizes["local_attention"] = 8
    for name, value in vars(config).items():
        if name.endswith(("dropout", "dropout_prob", "pdrop")) and isinstance(value, float):
            sizes[name] = 0.0
        elif name.endswith("token_id") and value is not None:
            sizes[name] = min(value, VOCABULARY)  # the last of the vocabulary, which no batch draws
    return checkpoint.config | {config.attribute_map.get(name, name): value for name, value in sizes.items()}


def cases():
    """[(a checkpoint, its configuration in small)], one of those that share it, under its name and their number."""
    groups = defaultdict(list)
    for checkpoint in CHECKPOINTS:
        key = (checkpoint.model_type, checkpoint.loaded_as, tuple(sorted(small(checkpoint).items())))
        groups[key].append(checkpoint)
    return [
        pytest.param(same[0], dict(arguments), id=same[0].name + (f" and {len(same) - 1}" if same[1:] else ""))
        for (_, _, arguments), same in groups.items()
    ]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("checkpoint", "arguments"), cases())
def test_loss_and_gradients_of_whole_layers(checkpoint, arguments):
    config = transformers.AutoConfig.for_model(checkpoint.model_type, **arguments)
    make = getattr(transformers, checkpoint.loaded_as).from_config
    batch = {"batch": 4, "padding": "right"}
    model = check_models(lambda seed: drawn(lambda: make(config), seed), torch.float32, batch)
    rows = {row.modules: row for row in fasttune.report(model).rows}
    assert rows["(packing)"].calls == rows["(layers)"].calls == config.num_hidden_layers
    left = {name: row.note for name, row in rows.items() if not row.runs or "stepped aside" in row.note}
    assert not left


def test_what_the_data_say():
    names = [checkpoint.name for checkpoint in CHECKPOINTS]
    assert len(names) == len(set(names)) >= 60
    for checkpoint in CHECKPOINTS:
        defaults = transformers.AutoConfig.for_model(checkpoint.model_type)
        model = getattr(transformers, checkpoint.loaded_as)._model_mapping[type(defaults)]
        code = inspect.getsource(inspect.getmodule(model))  # which may ask for what the class has no default of
        unknown = [n for n in checkpoint.config if not hasattr(defaults, n) and f'getattr(config, "{n}"' not in code]
        assert not unknown, f"{checkpoint.name}: {type(defaults).__name__} has no {', '.join(unknown)}"
        config = checkpoint.of_class()
        assert config.hidden_size % config.num_attention_heads == 0, checkpoint.name
        assert MIN_HEAD_DIM <= head_dim_of(config) <= MAX_HEAD_DIM, checkpoint.name


def test_the_page_lists_them():
    path = Path(__file__).parents[2] / "scripts" / "checkpoints_page.py"
    spec = importlib.util.spec_from_file_location("checkpoints_page", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    written = script.PAGE.read_text().split(script.BEGIN)[1].split(script.END)[0].strip()
    assert written == script.table(), "run scripts/checkpoints_page.py"
