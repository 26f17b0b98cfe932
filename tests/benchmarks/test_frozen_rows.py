"""The needed matrix products of steps that train a part of the model are those that a stock step runs."""

import frozen_workloads
import pytest
import step_workloads
from batches import Batch
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", frozen_workloads.PARTS)
def test_needed_products_are_those_of_a_stock_step(name):
    if name == "lora":
        pytest.importorskip("peft")
    config, part = step_workloads._configs(quick=True)["bert"], frozen_workloads.PARTS[name]
    batch = Batch.full(3, 9)
    step = frozen_workloads._side("stock eager", config, part, batch)
    with FlopCounterMode(display=False) as counter:
        step()
    needed = sum(product.flops for product in frozen_workloads.needed(config, part, batch, whole_last_layer=True))
    assert needed == pytest.approx(counter.get_total_flops())
    assert sum(product.flops for product in frozen_workloads.needed(config, part, batch)) < needed
    if name != "full":
        everything = frozen_workloads.needed(config, frozen_workloads.PARTS["full"], batch, whole_last_layer=True)
        assert needed < sum(product.flops for product in everything)
