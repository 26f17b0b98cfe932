"""How the model is called: functions of (model, inputs) that give its outputs."""

import inspect

import torch
from torch import nn


def keywords(model, inputs):
    return model(**inputs)


def forward(model, inputs):
    return model.forward(**inputs)


def positional(model, inputs):
    """The first arguments by position, as far as they are given in a row or default to None."""
    inputs, given = dict(inputs), []
    for name, parameter in list(inspect.signature(type(model).forward).parameters.items())[1:4]:
        if parameter.default not in (None, inspect.Parameter.empty):
            break
        given.append(inputs.pop(name, None))
    return model(*given, **inputs)


def as_a_tuple(model, inputs):
    return model(**inputs, return_dict=False)


def without_a_cache(model, inputs):
    return model(**inputs, use_cache=False)


def inside_a_module(model, inputs):
    """The module of one's own is what was patched."""
    return Holder(model)(**inputs)


def embedded(model, inputs):
    inputs = dict(inputs)
    ids = inputs.pop("input_ids")
    return model(inputs_embeds=model.get_input_embeddings()(ids), **inputs)


def the_second_time(model, inputs):
    """Another batch went through before, and nobody read what it gave."""
    others = {name: value.flip(0) if value.shape[:1] == inputs["input_ids"].shape[:1] else value
              for name, value in inputs.items() if isinstance(value, torch.Tensor)}  # fmt: skip
    model(**(inputs | others))
    return model(**inputs)


class Holder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.encoder = model

    def forward(self, **inputs):
        return self.encoder(**inputs)


CALLS = (*(keywords, forward, positional, as_a_tuple, without_a_cache, inside_a_module, embedded, the_second_time),)
