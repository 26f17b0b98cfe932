"""What happens between the call and the reading: functions of a Run (run.py)."""

import copy
import gc
import io
import pickle

import torch
from torch import nn

import fasttune


def nothing(run):
    pass


def eval_mode(run):
    run.model.eval()


def train_mode(run):
    run.model.train()


def other_dropout(run):
    for module in run.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.7
    run.model.train()


def everything_toggled(run):
    """While it is read, every weight wants a gradient that did not, and the other way round."""
    before = {p: p.requires_grad for p in run.parameters.values()}
    for parameter, wanted in before.items():
        parameter.requires_grad_(not wanted)
    run.before_backward.append(lambda: [p.requires_grad_(wanted) for p, wanted in before.items()])


def half_frozen(run):
    for parameter in list(run.parameters.values())[::2]:
        parameter.requires_grad_(False)


def left_the_block(run):
    """`with fasttune.patched(model):` ends."""
    run.leave()


def unpatched(run):
    if run.patched:
        fasttune.unpatch(run.model)


def patched_otherwise(run):
    if run.patched:
        fasttune.patch(run.model, packing=False, trim=False, loss=False)


def deleted(run):
    run.forget_the_model()
    gc.collect()


def read_without_gradients(run):
    with torch.no_grad():
        run.note("read under no_grad", run.reading.x[:, -1] * 1.0)


def read_under_inference_mode(run):
    with torch.inference_mode():
        value = run.reading.x[:, :1] * 1.0
    run.note("read under inference_mode", value)


def read_under_autocast(run):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run.note("read under autocast", run.reading.x[:, -1] * 1.0)


def pickled(run):
    run.note("pickled", pickle.loads(pickle.dumps(run.reading.x)))


def saved(run):
    file = io.BytesIO()
    torch.save(list(run.reading.tensors), file)
    file.seek(0)
    run.note("saved", torch.load(file)[run.reading.x_at])


def copied(run):
    run.note("copied", copy.deepcopy(run.reading.x.detach()))


def model_copied(run):
    """And the copy's weights written to."""
    twin = copy.deepcopy(run.model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()


def another_call(run):
    """Of the same batch, read and differentiated; its gradients count as well."""
    other = run.again()
    value = other.x[:, 0].square().sum()
    if value.requires_grad:
        value.backward()


def optimizer_step(run):
    for parameter in run.parameters.values():
        parameter.grad = torch.full_like(parameter, 0.1) if parameter.requires_grad else None
    torch.optim.SGD(run.parameters.values(), lr=0.5).step()
    run.weights_changed()


def written_in_place(run):
    with torch.no_grad():
        for parameter in run.parameters.values():
            parameter.mul_(0.5)
    run.weights_changed()


def written_through_data(run):
    for parameter in run.parameters.values():
        parameter.data.mul_(0.5)
    run.weights_changed()


BETWEEN = (
    *(nothing, eval_mode, train_mode, other_dropout, everything_toggled, half_frozen, left_the_block, unpatched),
    *(patched_otherwise, deleted, read_without_gradients, read_under_inference_mode, read_under_autocast),
    *(pickled, saved, copied, model_copied, another_call, optimizer_step, written_in_place, written_through_data),
)
CHANGES_WEIGHTS = (optimizer_step, written_in_place, written_through_data)
