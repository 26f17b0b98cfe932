"""With packing=False and trim=False nothing in fasttune looks at a tensor's values, and the host never waits for the
device. The Triton kernels run in their interpreter, on tensors that count as a GPU's. (With them on, a mask is read
once, and the labels once where the loss picks its rows; what is computed from that on the CPU looks like a read here.)

What Transformers itself reads back (whether a padding id occurs, whether position ids start anew) is not counted.
"""

import sys
import traceback
from pathlib import Path

import interpreter
import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "patching"))

from models import batch_of, build, loss_of  # noqa: E402

import fasttune  # noqa: E402
from fasttune.patching.layers import attention, entry, tied  # noqa: E402
from fasttune.patching.promises import moment  # noqa: E402

INTERPRETER = tuple(str(Path(package.__file__).parent) for package in (triton, interpreter))
OURS = (str(Path(fasttune.__file__).parent),)
THEIRS = (*INTERPRETER, str(Path(transformers.__file__).parent))
READS = {
    *("_local_scalar_dense", "nonzero", "_unique", "_unique2", "unique_dim", "unique_consecutive", "equal"),
    *("masked_select", "bincount", "repeat_interleave", "is_nonzero", "_coalesce"),
}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}


class Reads(TorchDispatchMode):
    """Notes every operator that hands values to the host, or a size that depends on them, and who called it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name in READS or by_mask:
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, name):
        stack = [frame for frame in reversed(traceback.extract_stack()) if frame.filename.startswith((*OURS, *THEIRS))]
        if stack and stack[0].filename.startswith(THEIRS):  # who is nearest to the operator has called it
            return
        ours = [f"{name} in {frame.filename}:{frame.lineno}" for frame in stack if frame.filename.startswith(OURS)]
        if ours or not stack:
            self.found.append(ours[0] if ours else f"{name} in the backward of an operator of torch")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setenv("FASTTUNE_BACKEND", "triton")
    monkeypatch.setattr(moment.Weights, "_sample", lambda self: None)  # as where a weight is on a GPU
    for module in (attention, entry, tied):
        monkeypatch.setattr(module, "reading_waits", lambda device: True)
    for check in ("check_offsets", "check_positions"):  # of tensors on a CPU
        monkeypatch.setattr(sys.modules["fasttune.ops.attention"], check, lambda *args: None)


def reads_of_a_step(head, padding, **options):
    transformers.logging.set_verbosity_error()
    model = fasttune.patch(build(head, dropout=0.1), **options)
    model.config.use_cache = False  # which keeps every row of the last layer
    inputs = batch_of(model, padding=padding)
    if head == "GPT2LMHeadModel":  # an answer after a prompt: few rows
        inputs["labels"][:, : inputs["labels"].shape[1] // 2] = -100
    with Reads() as reads:
        loss = loss_of(model, inputs)
        loss.backward()
    assert torch.isfinite(loss)
    return reads.found


HEADS = ["GPT2LMHeadModel", "GPT2ForSequenceClassification", "BertForMaskedLM", "BertForSequenceClassification"]


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("head", HEADS)
def test_nothing_is_read_with_packing_and_row_selection_off(head, padding):
    assert reads_of_a_step(head, padding, packing=False, trim=False) == []


def test_reading_is_noticed():
    """Of the tester: with packing the mask is read."""
    assert any("padding" in read for read in reads_of_a_step("BertForMaskedLM", "right"))
