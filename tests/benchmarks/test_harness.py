"""The benchmark harness on tiny shapes: counts of matrix products, ratios, the report, and a whole quick run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import encoder_workloads
import memory
import needed
import op_workloads
import pairs
import products
import pytest
import report
import step_workloads
import torch
from batches import Batch
from workload import Workload

ROOT = Path(__file__).parents[2]


def test_products_of_a_linear_layer():
    forward, input_gradient, weight_gradient = products.linear(5, 7, 3)
    assert (forward.m, forward.k, forward.n) == (5, 7, 3)
    assert (input_gradient.m, input_gradient.k, input_gradient.n) == (5, 3, 7)
    assert (weight_gradient.m, weight_gradient.k, weight_gradient.n) == (3, 5, 7)
    assert products.linear(0, 7, 3) == []


def _mm_flops(run):
    """Operations of all matrix products that torch runs, as its own counter sees them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("gpt2", Batch.full(2, 9)),
        ("classification", Batch.full(3, 9)),
        ("mlm", Batch.full(3, 9)),
    ],
)
def test_needed_products_are_those_of_a_stock_step(name, batch):
    """Stock runs them all (every label is set), and for GPT-2 also the masked half and the last position's logits."""
    config = step_workloads._configs(quick=True)["gpt2" if name == "gpt2" else "bert"]
    head = "lm" if name == "gpt2" else name
    found = needed.needed_products(config, head, batch, whole_last_layer=True)
    expected = sum(product.flops for product in found)
    stock = _mm_flops(step_workloads._side("stock eager", config, head, batch))
    if name == "gpt2":
        length, width = batch.lengths[0], config.n_embd
        full = sum(p.flops for p in products.attention(batch.lengths, 2, width // 2, config.n_layer))
        causal = sum(p.flops for p in products.attention(batch.lengths, 2, width // 2, config.n_layer, causal=True))
        assert causal == pytest.approx(full * (length + 1) / (2 * length))
        expected += full - causal
        expected += sum(p.flops for p in products.linear(len(batch.lengths), width, config.vocab_size))
    assert expected == pytest.approx(stock)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        *(("distilbert", "classification"), ("albert", "classification"), ("modernbert", "classification")),
        *(("mpnet", "classification"), ("modernbert", "mlm"), ("esm", "mlm")),
    ],
)
def test_needed_products_of_encoders_are_those_of_a_stock_step(name, head):
    config, batch = encoder_workloads._configs(quick=True)[name], Batch.full(3, 9)
    if name == "modernbert":
        config.sliding_window = 9  # stock multiplies what a window hides, too
    found = needed.needed_products(config, head, batch, whole_last_layer=True)
    stock = _mm_flops(step_workloads._side("stock eager", config, head, batch))
    assert sum(product.flops for product in found) == pytest.approx(stock)


def test_needed_products_of_disentangled_attention(monkeypatch):
    """Those of a stock step, which takes all embeddings; of these a sequence needs what its distances reach."""
    config, batch = encoder_workloads._configs(quick=True)["deberta"], Batch.full(3, 9)
    assert [needed.reached(config, length) for length in (1, 2, 3, 32)] == [1, 3, 5, 7]
    real = needed.needed_products(config, "classification", batch, whole_last_layer=True)
    monkeypatch.setattr(needed, "reached", lambda config, length: 2 * config.position_buckets)
    found = needed.needed_products(config, "classification", batch, whole_last_layer=True)
    stock = _mm_flops(step_workloads._side("stock eager", config, "classification", batch))
    assert sum(product.flops for product in found) == pytest.approx(stock)
    assert sum(product.flops for product in real) < stock


def test_a_window_needs_the_pairs_that_it_lets_through():
    """Five tokens, each of which sees its neighbours: 13 of 25 pairs."""
    whole, near = (products.attention((5,), 2, 8, window=window) for window in (None, 1))
    assert sum(p.flops for p in near) == pytest.approx(sum(p.flops for p in whole) * 13 / 25)


def test_padding_and_unlabelled_rows_are_not_needed():
    config = step_workloads._configs(quick=True)["bert"]

    def flops(batch):
        return sum(product.flops for product in needed.needed_products(config, "mlm", batch))

    assert flops(Batch((4, 9))) < flops(Batch((9, 9)))
    assert flops(Batch((9, 9), label_ratio=0.2)) < flops(Batch((9, 9)))
    heads = products.attention([4, 9, 9], heads=2, head_dim=16)
    assert sum(p.flops for p in heads) == pytest.approx(6 * 2 * 2 * 16 * (16 + 81 + 81))


@pytest.mark.parametrize("transposed_a", [False, True])
@pytest.mark.parametrize("transposed_b", [False, True])
@pytest.mark.parametrize("batch", [0, 3])
def test_timer_runs_the_shapes_it_is_given(batch, transposed_a, transposed_b):
    product = products.Product(4, 5, 6, 2.0, batch, transposed_a, transposed_b)
    timer = products.ProductTimer([product, product])
    assert timer.gflop == pytest.approx(2 * product.flops / 1e9)
    ((count, run),) = timer._timed
    assert count == 4.0
    assert run().shape == ((3, 4, 6) if batch else (4, 6))
    assert _mm_flops(run) == product.flops / product.count
    assert timer() > 0


def test_batches_have_the_labels_and_lengths_they_say():
    batch = Batch.ragged(20, 3, 17, label_ratio=0.25)
    assert batch == Batch.ragged(20, 3, 17, label_ratio=0.25)
    inputs = batch.inputs(97, "mlm")
    assert inputs["attention_mask"].sum(1).tolist() == list(batch.lengths)
    labelled = inputs["labels"] != -100
    assert labelled.sum(1).tolist() == [max(1, round(0.25 * length)) for length in batch.lengths]
    assert (inputs["labels"][labelled] == inputs["input_ids"][labelled]).all()
    assert not (labelled & (inputs["attention_mask"] == 0)).any()


def test_ratios_are_medians_of_pairs():
    workload = Workload("op", "2 x 2", "float32", {}, useful_bytes=10**9)
    # The machine gets ten times slower half-way: ratios of medians would be wrong, medians of ratios are not.
    info = pairs.outcome(workload, [1.0, 10.0, 1.0], {"a": [2.0, 20.0, 2.0], "b": [3.0, 30.0, 30.0]}, [0.5, 5.0, 0.5])
    assert info["peers"]["a"]["ratio"] == 2.0
    assert info["best_peer"] == "a"
    assert info["speedup"] == 2.0
    assert info["over_products"] == 2.0
    assert info["peers"]["a"]["over_products"] == 4.0
    assert info["gb_per_s"] == 1.0


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="reads Linux's own figures")
def test_extra_memory_sees_the_logits():
    """Stock cross-entropy holds a log-softmax as large as the logits beside the gradient, and at times a copy."""
    workload = op_workloads.cross_entropy(2048, 8192, dtype=torch.float32)  # 64 MiB, never cut from a heap
    logits = workload.kept_bytes
    assert 0.9 * logits < memory.measure(workload, "F.cross_entropy") < 2.5 * logits


@pytest.mark.slow
def test_quick_run_and_report(tmp_path):
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--quick", "--threads", "1", "-q"]
    output = tmp_path / "benchmarks.json"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, f"--benchmark-json={output}", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = {row["name"] for row in json.loads(output.read_text())["benchmarks"]}
    assert len(names) > 40
    page = report.write([output], tmp_path).read_text()
    report.keep(output, tmp_path / "kept")
    assert report.write([tmp_path / "kept" / output.name], tmp_path / "again").read_text() == page
    for heading in ("## Training steps", "## Operations", "## Overhead"):
        assert heading in page
    assert "the figures mean nothing" in page
    for plot in ("benchmarks-steps.png", "benchmarks-operations.png", "benchmarks-fill.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
