"""A patched step makes the host wait for the device once, where the model is entered, for the numbers that packing and
row selection need; with packing=False and trim=False never: nothing in fasttune looks at a tensor's values. The Triton
kernels run in their interpreter, on tensors that count as a GPU's.

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
from fasttune.patching import attention, facts, last_layer, lazy_rows, plan, tied  # noqa: E402

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
        if stack and stack[0].filename.startswith(INTERPRETER):
            return
        ours = [f"{name} in {frame.filename}:{frame.lineno}" for frame in stack if frame.filename.startswith(OURS)]
        if ours or not stack:
            self.found.append(ours[0] if ours else f"{name} in the backward of an operator of torch")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setenv("FASTTUNE_BACKEND", "triton")
    for module in (attention, last_layer, lazy_rows, tied):
        monkeypatch.setattr(module, "reading_waits", lambda device: True)
    for check in ("check_offsets", "check_positions"):  # of tensors on a CPU
        monkeypatch.setattr(sys.modules["fasttune.ops.attention"], check, lambda *args: None)


@pytest.fixture
def fetched(monkeypatch):
    """How many layers were done each time that numbers were fetched."""
    done, before = [], []
    bias_gelu, fetch = fasttune.ops.bias_gelu, facts.fetch
    monkeypatch.setattr(fasttune.ops, "bias_gelu", lambda *a, **o: (done.append(None), bias_gelu(*a, **o))[1])
    for module in (facts, plan):
        monkeypatch.setattr(module, "fetch", lambda numbers: (before.append(len(done)), fetch(numbers))[1])
    return before


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
def test_nothing_is_read_with_packing_and_row_selection_off(head, padding, fetched):
    assert reads_of_a_step(head, padding, packing=False, trim=False) == []
    assert fetched == []


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("head", HEADS)
def test_numbers_are_read_once_before_the_layers(head, padding, fetched):
    assert reads_of_a_step(head, padding) == []
    assert fetched == [0]


def test_reading_is_noticed(monkeypatch):
    """Of the tester: where reading costs nothing, the loss asks how many rows there are."""
    monkeypatch.setattr(lazy_rows, "reading_waits", lambda device: False)
    assert any("packing" in read for read in reads_of_a_step("BertForMaskedLM", "right"))
