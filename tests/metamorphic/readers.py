"""Who reads what a model returned: functions of a Reading that give the tensor they made of it."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.trainer_pt_utils import LabelSmoother


def own_loss(reading):
    """The model's; for models without one, of the first hidden states."""
    return reading.loss if reading.loss is not None else first_token(reading)


def first_token(reading):
    return reading.layers.linear(reading.x.shape[-1], 3)(reading.x[:, 0])


def last_token(reading):
    return reading.x[torch.arange(len(reading.x)), reading.lengths - 1]


def masked_mean(reading):
    weights = reading.real.unsqueeze(-1).expand(reading.x.size()).to(reading.x.dtype)
    return torch.sum(reading.x * weights, 1) / weights.sum(1).clamp(min=1e-9)


def masked_maximum(reading):
    return reading.x.masked_fill(~reading.real.unsqueeze(-1), -1e4).max(1).values


def attention_pooling(reading):
    scores = torch.linspace(-1, 1, reading.real.shape[1], dtype=reading.x.dtype)
    weights = scores.expand(reading.real.shape).masked_fill(~reading.real, -1e9).softmax(-1)
    return torch.bmm(weights.unsqueeze(1), reading.x)


def lstm(reading):
    features = reading.x.shape[-1]
    packed = nn.utils.rnn.pack_padded_sequence(reading.x, reading.lengths, batch_first=True, enforce_sorted=False)
    layer = reading.layers(f"lstm {features}", lambda: nn.LSTM(features, 4, batch_first=True, bidirectional=True))
    return layer(packed)[0].data


def every_position(reading):
    """Padding included."""
    return (reading.x - reading.x.mean(1, keepdim=True)) ** 2


def padding_alone(reading):
    return reading.x[~reading.real]


def real_alone(reading):
    return reading.x[reading.real]


def all_hidden_states(reading):
    weights = torch.linspace(1, 2, len(reading.hidden_states), dtype=reading.layers.dtype)
    return sum(weight * hidden for weight, hidden in zip(weights, reading.hidden_states, strict=True))


def first_hidden_state(reading):
    return reading.hidden_states[1][:, ::2]


def everything_returned(reading):
    return torch.cat([tensor.to(reading.layers.dtype).flatten() for tensor in reading.tensors])


def chain_of_rows(reading):
    """Functions of each row, then few of them."""
    features = reading.x.shape[-1]
    x = reading.layers(f"norm {features}", lambda: nn.LayerNorm(features, eps=0.1))(reading.x)
    x = F.gelu(reading.layers.linear(features, 8)(F.dropout(x, 0.0)))
    return F.normalize(x / 3.0, dim=-1)[:, -2:]


def stacked(reading):
    return torch.cat([torch.stack([reading.x, reading.x * 2.0]).sum(0), reading.x], -1)[:, -1]


def integers(reading):
    return reading.x[[0, -1, 0], torch.tensor([0, -1, 0])]


def gathered(reading):
    index = (reading.lengths - 1).view(-1, 1, 1).expand(-1, 1, reading.x.shape[-1])
    return torch.cat([reading.x.gather(1, index), torch.take_along_dim(reading.x, index[..., :1], 1)], 1)


def selected(reading):
    return torch.cat(
        [reading.x.index_select(1, torch.tensor([0, -1 % reading.x.shape[1]])), reading.x.narrow(1, 0, 1)], 1
    )


def masked_selected(reading):
    return reading.x.masked_select(reading.real.unsqueeze(-1).expand(reading.x.shape)) ** 2


def where(reading):
    return torch.where(reading.real.unsqueeze(-1), reading.x, torch.zeros((), dtype=reading.x.dtype)).sum(1)


def shifted_loss(reading):
    """A causal loss of one's own: of logits, or of a head of one's own on hidden states."""
    logits = logits_of(reading)
    labels = (reading.ids % logits.shape[-1]).masked_fill(~reading.real, -100)
    labels[:, 0] = 1
    if logits.shape[1] > 1:
        logits, labels = logits[..., :-1, :].contiguous(), labels[:, 1:]
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum")


def weighted_loss(reading):
    """Padding labelled, classes weighted, another ignore_index, no reduction."""
    logits = logits_of(reading)
    classes = logits.shape[-1]
    return F.cross_entropy(
        logits.reshape(-1, classes),
        (reading.ids % classes).reshape(-1),
        weight=torch.linspace(0.5, 2, classes, dtype=logits.dtype),
        ignore_index=1,
        label_smoothing=0.1,
        reduction="none",
    )


def probabilities(reading):
    return logits_of(reading).log_softmax(-1).gather(-1, (reading.ids % 2).unsqueeze(-1))


def smoothed(reading):
    """As Trainer smooths labels."""
    logits = logits_of(reading)
    labels = (reading.ids % logits.shape[-1]).masked_fill(~reading.real, -100)
    return LabelSmoother(0.1)((logits,), labels)


def preferred(reading):
    """A sum of log-probabilities for each sequence, a penalty on logsumexp, and their focal form."""
    logits = logits_of(reading)
    labels = (reading.ids % logits.shape[-1]).unsqueeze(-1)
    log_p = F.log_softmax(logits, dim=-1).gather(-1, labels).squeeze(-1)
    z = torch.logsumexp(logits, dim=-1).masked_fill(~reading.real, 0.0)
    weights = reading.real.to(log_p.dtype)
    return torch.cat([(log_p * weights).sum(1), (z**2).sum(1), ((1 - log_p.exp()) ** 2 * log_p)[reading.real]])


def negative_likelihood(reading):
    logits = logits_of(reading)
    classes = logits.shape[-1]
    labels = (reading.ids % classes).masked_fill(~reading.real, -100).reshape(-1)
    return F.nll_loss(F.log_softmax(logits.reshape(-1, classes), dim=-1), labels, reduction="sum")


def largest_activation(reading):
    """SPLADE's pooling."""
    logits = logits_of(reading)
    masked = logits * reading.real.unsqueeze(-1).to(logits.dtype)
    return torch.max(masked.relu_().log1p(), dim=1)[0]


def scores_of_tokens(reading):
    """One number of each token, masked, then softmax over the tokens."""
    scores = reading.layers.linear(reading.x.shape[-1], 1)(reading.x).squeeze(-1)
    return scores.masked_fill(~reading.real, -1e4).softmax(-1)


def hooked(reading):
    """With a hook that changes the gradient of what it read."""
    x = reading.x
    if x.requires_grad:
        x.register_hook(lambda grad: 2.0 * grad)
    return torch.cat([x[:, 0] * 1.0, reading.layers.linear(x.shape[-1], 3)(x)[:, 0]], -1)


def detached(reading):
    return reading.x.detach() * 1.0


def logits_of(reading):
    """x, if it looks like logits of the vocabulary."""
    x = reading.x
    return x if x.shape[-1] == 101 else reading.layers.linear(x.shape[-1], 11)(x)


READERS = (
    *(own_loss, first_token, last_token, masked_mean, masked_maximum, attention_pooling, lstm, every_position),
    *(padding_alone, real_alone, all_hidden_states, first_hidden_state, everything_returned, chain_of_rows, stacked),
    *(integers, gathered, selected, masked_selected, where, shifted_loss, weighted_loss, probabilities, hooked),
    *(smoothed, preferred, negative_likelihood, largest_activation, scores_of_tokens, detached),
)
OF_HIDDEN_STATES = (all_hidden_states, first_hidden_state)
