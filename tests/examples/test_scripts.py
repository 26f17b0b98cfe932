"""The example scripts run from end to end, patched and stock, on tiny models."""

import importlib

import demo
import finetune_bert
import finetune_gpt2
import pytest
from transformers import BertConfig, BertModel


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = finetune_bert.load_tokenizer(finetune_bert.parse_args([]))
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("patch", ["--patch", "--no-patch"])
def test_finetune_bert(tiny_bert, patch, capsys):
    finetune_bert.main(["--model", str(tiny_bert), "--steps", "2", "--batch-size", "2", "--max-length", "16", patch])
    printed = capsys.readouterr().out
    assert "accuracy before" in printed
    assert "accuracy after" in printed


@pytest.mark.parametrize("patch", ["--patch", "--no-patch"])
def test_finetune_gpt2(patch, capsys):
    tiny = ["--layers", "1", "--width", "64", "--vocab-size", "300", "--length", "128", "--batch-size", "8"]
    finetune_gpt2.main([*tiny, "--steps", "2", "--prompt", "The", patch])
    printed = capsys.readouterr().out
    assert "perplexity before" in printed
    assert "perplexity after" in printed
    assert "\nThe" in printed


@pytest.mark.parametrize("side", ["stock", "fasttune"])
@pytest.mark.parametrize("name", ["finetune_embeddings", "finetune_reranker", "sft_gpt2_trl"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_what_frameworks_train(tiny_bert, name, side, capsys):
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("trl")
    tiny = {
        "finetune_embeddings": ["--model", str(tiny_bert), "--max-length", "16"],
        "finetune_reranker": ["--model", str(tiny_bert), "--max-length", "16", "--queries", "3"],
        "sft_gpt2_trl": ["--layers", "1", "--width", "64", "--vocab-size", "300", "--length", "64"],
    }[name]
    script = importlib.import_module(name)
    script.main([*tiny, "--steps", "2", "--batch-size", "4", "--side", side])
    printed = capsys.readouterr().out
    assert f"{side:9} 2 steps in" in printed
    assert "before" in printed


def test_batches_are_the_same_every_time():
    args = finetune_bert.parse_args(["--steps", "3", "--batch-size", "4"])
    tokenizer = finetune_bert.load_tokenizer(args)
    train, _ = finetune_bert.docstring_examples()
    first, second = (list(finetune_bert.training_batches(train, tokenizer, args)) for _ in range(2))
    assert [batch["input_ids"].tolist() for batch in first] == [batch["input_ids"].tolist() for batch in second]
    assert len({batch["input_ids"].shape[1] for batch in first}) > 1  # natural lengths


@pytest.mark.slow
def test_demo_of_one_model(tmp_path, capsys):
    demo.main(["--bert-steps", "0", "--gpt2-steps", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for row in ("step time", "tokens/s", "peak memory", "loss", "perplexity", "dropout off"):
        assert row in printed
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
