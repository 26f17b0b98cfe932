"""Batches, by what is padding in them and how the model is told."""

import torch
from models import PAD, batch_of


def no_mask(model, seed):
    return batch_of(model, seed=seed)


def mask_of_ones(model, seed):
    inputs = batch_of(model, seed=seed)
    return inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}


def right(model, seed):
    return batch_of(model, padding="right", seed=seed)


def left(model, seed):
    return batch_of(model, padding="left", seed=seed)


def holes(model, seed):
    return batch_of(model, padding="scattered", seed=seed)


def left_with_positions(model, seed):
    inputs = left(model, seed)
    return inputs | {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0) + 2}


def a_row_of_padding(model, seed):
    inputs = right(model, seed)
    inputs["attention_mask"][1] = 0
    inputs["input_ids"][1] = PAD
    return inputs


def one_sequence(model, seed):
    return batch_of(model, batch=1, seed=seed)


def one_padded_sequence(model, seed):
    inputs = batch_of(model, batch=1, length=9, seed=seed)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][..., 5:] = 0
    return inputs


def one_token(model, seed):
    return batch_of(model, length=1, seed=seed)


def labels_at_padding(model, seed):
    """All positions labelled, where the head labels positions."""
    inputs = right(model, seed)
    labels = inputs.get("labels")
    if labels is not None and labels.shape == inputs["input_ids"].shape:
        inputs["labels"] = torch.where(labels == -100, 2, labels)
    return inputs


def additive(model, seed):
    """A mask (B, 1, S, S) of zeros and the dtype's minimum."""
    return _square(model, right(model, seed), additive=True)


def booleans(model, seed):
    """A mask (B, 1, S, S) of True and False."""
    return _square(model, left(model, seed), additive=False)


def windows(model, seed):
    """A mask (B, 1, S, S) of a pattern that is not padding: neighbours see each other."""
    inputs = right(model, seed)
    near = torch.arange(inputs["input_ids"].shape[1])
    return _square(model, inputs, additive=True, also=(near[:, None] - near).abs() < 3)


def two_in_a_row(model, seed):
    """A mask (B, 1, S, S) of two sequences side by side in each row."""
    inputs = batch_of(model, seed=seed)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    number = (torch.arange(inputs["input_ids"].shape[1]) > 6).long()
    return _square(model, inputs, additive=True, also=number[:, None] == number)


def _square(model, inputs, *, additive, also=None):
    mask = inputs["attention_mask"].bool()
    length = mask.shape[-1]
    inputs["real"] = mask
    visible = mask[:, None, None].expand(-1, 1, length, length).clone()
    if getattr(model.config, "is_decoder", False) or model.config.model_type == "gpt2":
        visible &= torch.ones(length, length).tril().bool()
    if also is not None:
        visible &= also
        visible |= torch.eye(length).bool()
    if additive:
        visible = torch.zeros(visible.shape, dtype=model.dtype).masked_fill(~visible, torch.finfo(model.dtype).min)
    return inputs | {"attention_mask": visible}


PADDINGS = (
    *(no_mask, mask_of_ones, right, left, holes, left_with_positions, a_row_of_padding, one_sequence),
    *(one_padded_sequence, one_token, labels_at_padding, additive, booleans, windows, two_in_a_row),
)
SQUARE = (additive, booleans, windows, two_in_a_row)
