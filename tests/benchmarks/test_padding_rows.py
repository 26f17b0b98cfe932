"""What the rows of skipped work say that a step needs."""

import needed
import padding_workloads
import pytest
import step_workloads
import torch
from batches import Batch

CONFIG = step_workloads._configs(quick=True)


def flops(found):
    return sum(product.flops for product in found)


def test_where_every_row_is_read_the_whole_last_layer_is_needed():
    batch = Batch((9, 4, 7))
    skipping = needed.needed_products(CONFIG["bert"], "mlm", batch)
    assert flops(skipping) == pytest.approx(
        flops(needed.needed_products(CONFIG["bert"], "mlm", batch, whole_last_layer=True))
    )


@pytest.mark.parametrize(("family", "head"), [("bert", "classification"), ("gpt2", "lm")])
def test_rows_that_nobody_reads_are_not_counted(family, head):
    batch = padding_workloads.Answers((9, 4, 7))
    read = needed.read_rows(CONFIG[family], head, batch)
    # An answer starts in the middle; the row before a token predicts it.
    assert read == ([[0]] * 3 if family == "bert" else [[3, 4, 5, 6, 7], [1, 2], [2, 3, 4, 5]])
    skipping = flops(needed.needed_products(CONFIG[family], head, batch))
    assert skipping < flops(needed.needed_products(CONFIG[family], head, batch, whole_last_layer=True))


@pytest.mark.parametrize("fill", padding_workloads.FILLS)
def test_batches_are_as_full_as_they_say(fill):
    batch = padding_workloads.filled(fill, 16, 128)
    assert len(batch.lengths) == 16
    assert max(batch.lengths) == 128
    assert sum(batch.lengths) / (16 * 128) == pytest.approx(fill, abs=0.005)


def test_a_full_batch_may_come_with_a_mask():
    inputs = padding_workloads.Masked.full(2, 5).inputs(97, "mlm")
    assert torch.equal(inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long))
