"""Short training runs, and when two of them are the same run.

Every stack is judged as tests/oracle.py judges an operation: the truth is the same run of the stock model in float64,
in a plain loop; against it, a patched model under the stack may be off by at most twice what the stock model is under
the same stack, plus a floor of 4 ulps (of the largest gradient of the model where the true one is 0). Errors are maxima
over the steps of a run. Runs use SGD, whose updates are linear in the gradient: Adam would turn the last bit of a
gradient that is 0 in truth into a full step.
"""

import copy
from dataclasses import dataclass, field

import torch
from models import batch_of, build, loss_of
from oracle import max_error

HEADS = ["GPT2LMHeadModel", "GPT2ForSequenceClassification", "BertForMaskedLM", "BertForSequenceClassification"]
STEPS = 4
LEARNING_RATE = 0.05
FLOOR_ULPS = 4.0


@dataclass
class Run:
    """losses: one number a step; gradients: {name: tensor} a step, as they were before the optimizer's step."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def note(self, loss, named_parameters):
        self.losses.append(float(loss))
        self.gradients.append({name: p.grad.detach().clone() for name, p in named_parameters if p.grad is not None})


def batches(head, parts=1, steps=STEPS, **more):
    """steps lists of `parts` batches: padded right, padded left and full ones in turn."""
    model = build(head)
    options = {"batch": 3, "length": 13} | more
    return [
        [
            batch_of(model, padding=("right", "left", None)[(step + part) % 3], seed=10 * step + part + 1, **options)
            for part in range(parts)
        ]
        for step in range(steps)
    ]


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, momentum=0.9)


def train(model, data, loss_of=loss_of):
    """The plain loop that is the truth: each step's loss is the mean over its parts."""
    optimizer, run = sgd(model), Run()
    for parts in data:
        optimizer.zero_grad()
        total = 0.0
        for inputs in parts:
            loss = loss_of(model, inputs) / len(parts)
            loss.backward()
            total += loss.item()
        run.note(total, model.named_parameters())
        optimizer.step()
    return run


def exact_run(model, data, **more):
    """The run of a stock model in float64; the model itself stays as it is."""
    return train(copy.deepcopy(model).double(), data, **more)


def in_other_order(data, by):
    """The same batches with their sequences moved round: other roundings of the same mathematics."""
    return [[{name: value.roll(by, 0) for name, value in inputs.items()} for inputs in parts] for parts in data]


def assert_same_run(ours, stock, exact, dtype=torch.float32, again=()):
    """dtype: what the stack computes in, for the floor. again: stock's run by other roundings of the same mathematics;
    the largest error counts."""
    assert len(ours.losses) == len(stock.losses) == len(exact.losses)
    ulp = FLOOR_ULPS * torch.finfo(dtype).eps
    errors = [max(abs(a - b) for a, b in zip(run.losses, exact.losses, strict=True)) for run in (ours, stock)]
    floor = ulp * max(map(abs, exact.losses))
    _assert_within("losses", *errors, floor)
    names = exact.gradients[0].keys() if exact.gradients else ()
    assert all(step.keys() == names for run in (ours, stock, exact) for step in run.gradients)
    largest = max((grad.abs().max().item() for step in exact.gradients for grad in step.values()), default=0.0)
    for name in names:
        truth = [step[name] for step in exact.gradients]
        scale = max(grad.abs().max().item() for grad in truth)
        floor = ulp * (largest if scale < 1e-10 * largest else scale)
        error, *allowed = (
            max(max_error(step[name], grad) for step, grad in zip(run.gradients, truth, strict=True))
            for run in (ours, stock, *again)
        )
        _assert_within(name, error, max(allowed), floor)


def _assert_within(what, error, stock, floor):
    assert error <= 2 * stock + floor, f"{what}: error {error:.3g}, stock {stock:.3g}, floor {floor:.3g}"
