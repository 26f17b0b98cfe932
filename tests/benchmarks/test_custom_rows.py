"""The needed matrix products of custom modules on full batches are those that a stock step runs, where all is read."""

import custom_workloads
import pytest
import step_workloads
from batches import Batch
from custom_workloads import KINDS
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.parametrize("name", ["first-token", "masked-mean", "masked-max", "question-answering", "classification"])
def test_needed_products_are_those_of_a_stock_step(name):
    config, kind, batch = step_workloads._configs(quick=True)["bert"], KINDS[name], Batch.full(3, 9)
    inputs = batch.inputs(config.vocab_size, "classification") | {"attention_mask": batch.mask()}
    if kind.padding:
        inputs["start_positions"] = inputs["end_positions"] = inputs.pop("labels")
    step = custom_workloads._side("stock eager", config, kind, inputs)
    with FlopCounterMode(display=False) as counter:
        step()
    needed = sum(product.flops for product in custom_workloads.needed(config, kind, batch))
    if name in ("first-token", "classification"):  # stock computes the last layer's other rows
        assert needed < counter.get_total_flops()
    else:
        assert needed == pytest.approx(counter.get_total_flops())


def test_padding_costs_nothing_where_nobody_reads_it():
    config = step_workloads._configs(quick=True)["bert"]
    ragged, full = Batch.ragged(3, 3, 17), Batch.full(3, 17)
    for kind in KINDS.values():
        flops = [sum(p.flops for p in custom_workloads.needed(config, kind, batch)) for batch in (ragged, full)]
        assert flops[0] < flops[1]
