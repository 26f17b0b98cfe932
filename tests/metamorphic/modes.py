"""What a call and its readers run under: context managers, and checkpoints around the call."""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils.checkpoint import checkpoint


class Mode:
    """training: of the model. call: what the call runs under; read: what the readers run under."""

    def __init__(self, name, training=True, call=nullcontext, read=nullcontext, prepare=None, around=None):
        self.name, self.training, self.call, self.read = name, training, call, read
        self.prepare = prepare or (lambda model: None)
        self.around = around or (lambda function: function())

    def __repr__(self):
        return self.name


@contextmanager
def _autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


def _checkpointed(reentrant):
    """The whole call in a checkpoint of one's own."""

    def around(function):
        found = []

        def inner(nothing):
            found[:] = [function()]
            return tuple(found[0].tensors)

        tensors = checkpoint(inner, torch.zeros((), requires_grad=True), use_reentrant=reentrant)
        return found[0].with_tensors(tensors)

    return around


def _layers_checkpointed(reentrant):
    def prepare(model):
        model.config.use_cache = False
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    return prepare


TRAINING = Mode("training")
EVALUATION = Mode("evaluation", False, torch.no_grad, torch.no_grad)
INFERENCE = Mode("inference", False, torch.inference_mode, torch.inference_mode)
EVALUATION_WITH_GRADIENTS = Mode("evaluation with gradients", False)
TRAINING_WITHOUT_GRADIENTS = Mode("training mode without gradients", True, torch.no_grad)
AUTOCAST = Mode("autocast", call=_autocast, read=_autocast)
AUTOCAST_CALL = Mode("autocast around the call", call=_autocast)
AUTOCAST_EVALUATION = Mode("autocast in evaluation", False, _autocast)
CHECKPOINT = Mode("checkpoint", around=_checkpointed(False))
REENTRANT = Mode("reentrant checkpoint", around=_checkpointed(True))
LAYERS = Mode("checkpointed layers", prepare=_layers_checkpointed(False))
REENTRANT_LAYERS = Mode("reentrant checkpointed layers", prepare=_layers_checkpointed(True))

MODES = (
    *(TRAINING, EVALUATION, INFERENCE, EVALUATION_WITH_GRADIENTS, TRAINING_WITHOUT_GRADIENTS, AUTOCAST),
    *(AUTOCAST_CALL, AUTOCAST_EVALUATION, CHECKPOINT, REENTRANT, LAYERS, REENTRANT_LAYERS),
)
LOW_PRECISION = (AUTOCAST, AUTOCAST_CALL, AUTOCAST_EVALUATION)
