"""Patched models train through the Triton kernels as they do through the torch backend."""

import sys
from pathlib import Path

import pytest
import torch
from interpreter.memory import traffic

transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "patching"))

from models import batch_of, build, loss_of  # noqa: E402

import fasttune  # noqa: E402

# What each model must have run: a patch that stepped aside would compare torch with itself.
KERNELS = {
    "GPT2LMHeadModel": {
        "attention_forward_kernel",
        "attention_dq_kernel",
        "attention_dkdv_kernel",
        "layer_norm_forward_kernel",
        "layer_norm_backward_kernel",
        "activation_forward_kernel",
        "cross_entropy_forward_kernel",
    },
    "BertForSequenceClassification": {
        "attention_forward_kernel",
        "attention_dkdv_kernel",
        "layer_norm_backward_kernel",
        "activation_backward_kernel",
        "embedding_sum_kernel",
        "run_sums_kernel",
    },
}


def train(head):
    """Losses, first and last parameters of three steps with padding and one seed. SGD: an optimizer that normalises
    gradients blows the rounding of those that are 0 (a key's bias) up to whole steps."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = fasttune.patch(build(head, dropout=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, first = [], [parameter.detach().clone() for parameter in model.parameters()]
    for step in range(3):
        torch.manual_seed(step)
        loss = loss_of(model, batch_of(model, seed=step, padding="right"))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    aside = [note for row in fasttune.report(model).rows if "stepped aside" in (note := row.note)]
    assert not aside, f"stepped aside: {aside}"
    return torch.stack(losses), first, [parameter.detach() for parameter in model.parameters()]


# With dropout, so that the masks have to agree as well: one generator for all backends.
@pytest.mark.parametrize("head", KERNELS)
def test_three_steps_are_those_of_the_torch_backend(head, monkeypatch):
    monkeypatch.setenv("FASTTUNE_BACKEND", "triton")
    with traffic() as moved:
        losses, _, parameters = train(head)
    missing = KERNELS[head] - {kernel for kernel, _ in moved}
    assert not missing
    monkeypatch.setenv("FASTTUNE_BACKEND", "torch")
    expected_losses, first, expected = train(head)
    # Both round one float32 computation: what they differ by is 1000 units in the last place of the way that was gone.
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
    way = max((last - begin).abs().max() for last, begin in zip(expected, first, strict=True))
    apart = max((ours - theirs).abs().max() for ours, theirs in zip(parameters, expected, strict=True))
    assert apart <= 1000 * torch.finfo(torch.float32).eps * way
