"""What a call returned, in the same form for every head and every way of calling."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn


class Layers:
    """The layers of whoever reads: made at first use, the same ones for every twin."""

    def __init__(self, dtype):
        self.dtype, self.made = dtype, {}

    def __call__(self, name, make):
        if name not in self.made:
            with torch.random.fork_rng():
                torch.manual_seed(7)
                self.made[name] = make().to(self.dtype)
        return self.made[name]

    def linear(self, inputs, outputs):
        return self(f"linear {inputs} {outputs}", lambda: nn.Linear(inputs, outputs))

    def named_parameters(self):
        for name, layer in self.made.items():
            yield from ((f"reader: {name}: {part}", p) for part, p in layer.named_parameters())


@dataclass
class Reading:
    """tensors: all that was returned, side by side; the others say where in it something is.

    x (N, S, E): the hidden states of a bare model, else logits of every token, else the last hidden state. ids (N, S)
    and real (N, S) bool: the tokens that were given, and which of them are no padding.
    """

    tensors: list[Tensor]
    loss_at: int | None
    x_at: int | None
    hidden_at: list[int]
    ids: Tensor
    real: Tensor
    layers: Layers = field(repr=False)

    @property
    def loss(self):
        return None if self.loss_at is None else self.tensors[self.loss_at]

    @property
    def x(self):
        return self._of_sequences(self.x_at)

    @property
    def hidden_states(self):
        return [self._of_sequences(at) for at in self.hidden_at]

    def _of_sequences(self, at):
        """Without a dimension for choices."""
        x = self.tensors[at]
        x = x if x.dtype == self.layers.dtype else x.to(self.layers.dtype)
        return x.flatten(0, 1) if x.dim() == 4 else x

    @property
    def lengths(self):
        return self.real.sum(1).clamp(min=1)

    def with_tensors(self, tensors):
        return replace(self, tensors=list(tensors))


def reading_of(outputs, inputs, layers):
    """outputs: a ModelOutput or a tuple."""
    values = outputs if isinstance(outputs, tuple) else outputs.to_tuple()
    tensors, hidden_at = [], []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, tuple):
            hidden_at = list(range(len(tensors), len(tensors) + len(value)))
            tensors += value
    shape = tuple(inputs["input_ids"].shape)
    loss_at = next((at for at, value in enumerate(tensors) if value.dim() == 0), None)
    x_at = next((at for at, value in enumerate(tensors) if tuple(value.shape[:-1]) == shape), None)
    if x_at is None and hidden_at:
        x_at = hidden_at[-1]
    return Reading(tensors, loss_at, x_at, hidden_at, inputs["tokens"], inputs["real"], layers)
