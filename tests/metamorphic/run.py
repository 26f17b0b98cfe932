"""One run of a case by one twin: stock in float64, stock, or patched."""

from contextlib import ExitStack

import torch
from between import left_the_block
from calls import Holder, inside_a_module
from models import build
from readers import OF_HIDDEN_STATES, everything_returned
from reading import Layers, reading_of

import fasttune


class Run:
    """values: {name: what was read}, gradients: {name: gradient}, loss: float, once `go` has run."""

    def __init__(self, case, draw, dtype=torch.float32, options=None, dropout=0.0, seed=None):
        """options: of fasttune.patch; None for stock."""
        self.case, self.patched = case, options is not None
        model = build(case.head, dropout=dropout, seed=draw).to(dtype).train(case.mode.training)
        model.set_attn_implementation(case.attention)
        case.structure(model)
        case.mode.prepare(model)
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.layers = Layers(dtype)
        self.inputs = inputs_of(case, model, draw + 1)
        self.values, self.gradients, self.loss = {}, {}, None
        self.before_backward = []
        self.differentiable = True
        self._patching = ExitStack()
        if self.patched:
            target = Holder(model) if case.call is inside_a_module else model
            if case.between is left_the_block:
                self._patching.enter_context(fasttune.patched(target, **options))
            else:
                fasttune.patch(target, **options)
        if seed is not None:
            torch.manual_seed(seed)

    def again(self):
        return self.case.mode.around(self._call)

    def _call(self):
        inputs = {name: value for name, value in self.inputs.items() if name not in ("tokens", "real")}
        with self.case.mode.call():
            return reading_of(self.case.call(self.model, inputs), self.inputs, self.layers)

    # For what happens in between

    def note(self, name, value):
        self.values[name] = value.detach().clone()

    def leave(self):
        self._patching.close()

    def forget_the_model(self):
        self.model = None

    def weights_changed(self):
        self.differentiable = False

    # The whole run

    def go(self, first=()):
        """first: readers whose values nobody uses."""
        self.reading = self.again()
        self.case.between(self)
        for reader in first:
            self._read(reader)
        total = 0.0
        for reader in self.case.readers:
            value, numbers = self._read(reader)
            if value is None:
                continue
            self.values[reader.__name__] = numbers
            if value.requires_grad and self.differentiable:
                total = total + (value * fixed(value)).sum()
        for undo in self.before_backward:
            undo()
        if self.differentiable and isinstance(total, torch.Tensor):
            total.backward()
            named = (*self.parameters.items(), *self.layers.named_parameters())
            self.gradients = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}
        return self

    def _read(self, reader):
        """(what the reader made, its numbers); None where fasttune says that the values are gone."""
        try:
            with self.case.mode.read():
                value = reader(self.reading)
            return value, value.detach().clone()
        except RuntimeError as error:
            if self.differentiable or not self.patched or not str(error).startswith("fasttune: "):
                raise
            return None, None


def fixed(value):
    """Weights of a sum: different for each element."""
    return torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view(value.shape).to(value.dtype)


def inputs_of(case, model, seed):
    """The batch, and what readers know about it: tokens (N, S), real (N, S) bool."""
    inputs = case.padding(model, seed)
    ids = inputs["input_ids"]
    real = inputs.pop("real", None)
    if real is None:
        real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    wanted = {*OF_HIDDEN_STATES, everything_returned} & set(case.readers)
    if wanted or not of_every_token(case.head):
        inputs["output_hidden_states"] = True
    return inputs | {"tokens": ids.reshape(-1, ids.shape[-1]), "real": real.reshape(-1, ids.shape[-1])}


def of_every_token(head):
    """Whether the model returns something (N, S, E) without being asked for hidden states."""
    return head.endswith(("Model", "ForMaskedLM", "ForCausalLM", "ForTokenClassification", "BertForPreTraining"))
