"""A training step of the operations on CUDA tensors never looks at a value that lies on the device.

The public functions run on fake CUDA tensors, through the launchers that eager CUDA tensors take, and then the backward
of each operator they used: fake tensors have shapes but no values, so whatever would read one back (item, tolist, a
comparison, nonzero) raises. That, and that nothing is compiled anew for a batch (test_specialisations.py), is what can
be said about CUDA graphs without a GPU. Autograd's engine itself refuses CUDA tensors in a CPU build of torch, so the
operators are played back from a list.
"""

import sys

import aot
import gpu_cases
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from fasttune import ops
from fasttune.ops import _operator
from fasttune.ops.packing import PackedBatch

DTYPE = torch.bfloat16


class Context:
    """What autograd hands to forward and backward of a Function."""

    def __init__(self, args):
        self.needs_input_grad = [isinstance(arg, torch.Tensor) and arg.dtype.is_floating_point for arg in args]
        self.saved_tensors = ()

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def set_materialize_grads(self, value):
        pass


@pytest.fixture(autouse=True)
def tape(monkeypatch):
    """Operators run eagerly and are noted, with their contexts and results."""
    noted = []

    def call(self, *args):
        if not self.differentiable:
            outputs = self._run(*args)
            if isinstance(outputs, torch.Tensor):
                return outputs
            return outputs[0] if self.public == 1 else tuple(outputs[: self.public])
        context = Context(args)
        outputs = self._apply.__self__.forward(context, *args)
        noted.append((self, context, outputs if isinstance(outputs, tuple) else (outputs,)))
        return outputs

    monkeypatch.setenv("FASTTUNE_BACKEND", "triton")
    monkeypatch.setattr(_operator.Operator, "__call__", call)
    monkeypatch.setattr(torch, "is_grad_enabled", lambda: True)
    for name, module in list(sys.modules.items()):
        if name.startswith("fasttune.ops") and hasattr(module, "must_be_traced"):
            monkeypatch.setattr(module, "must_be_traced", lambda *tensors: False)
    return noted


def play(step, tape):
    with torch.no_grad():
        step()
        torch.is_grad_enabled = lambda: False  # nobody asks for the gradients' graph; the fixture puts it back
        for operator, context, outputs in reversed(list(tape)):
            operator._apply.__self__.backward(context, *(torch.empty_like(out) for out in outputs))


def leaf(*shape):
    return gpu_cases.empty(*shape, dtype=DTYPE).requires_grad_()


def integers(*shape):
    return gpu_cases.empty(*shape, dtype=torch.int64)


def attention():
    return ops.attention_packed_qkv(leaf(2, 64, 3, 12, 64), causal=True, dropout_p=0.1)


def packed_attention():
    query, offsets = leaf(128, 12, 64), gpu_cases.empty(3, dtype=torch.int32)
    return ops.attention(query, query, query, cu_seqlens=offsets, max_seqlen=64)


def attention_of_chosen_queries():
    offsets, positions = (gpu_cases.empty(size, dtype=torch.int32) for size in (3, 20))
    chosen = {"cu_seqlens": offsets, "cu_seqlens_q": offsets, "positions_q": positions}
    return ops.attention(leaf(20, 12, 64), leaf(128, 12, 64), leaf(128, 12, 64), dropout_p=0.1, **chosen)


def norms():
    x, weight, bias = leaf(2, 64, 768), leaf(768), leaf(768)
    x = ops.dropout_add_layer_norm(x, x, weight, bias, dropout_p=0.1)
    return ops.gelu_layer_norm(ops.layer_norm_gelu(ops.layer_norm(x, weight, bias), weight, bias), weight, bias)


def elementwise():
    gated = ops.gated_activation(leaf(2, 64, 6144), bias=leaf(6144))
    return ops.dropout(gated + ops.bias_gelu(leaf(2, 64, 3072), leaf(3072), approximate="tanh"), dropout_p=0.1)


def embeddings():
    ids = integers(2, 64)
    options = {"token_type_ids": ids, "token_type_weight": leaf(2, 768), "padding_idx": 0}
    return ops.embedding(ids, leaf(30522, 768), norm_weight=leaf(768), norm_bias=leaf(768), dropout_p=0.1, **options)


def loss():
    return ops.cross_entropy(leaf(128, 30522), integers(128), label_smoothing=0.1)


def linear_loss():
    return ops.linear_cross_entropy(leaf(128, 768), leaf(50257, 768), integers(128), linear_bias=leaf(50257))


def log_probs():
    found = ops.linear_log_prob(leaf(128, 768), leaf(50257, 768), integers(128), linear_bias=leaf(50257))
    return found.log_prob + found.entropy


def pooled_maxima():
    offsets = gpu_cases.empty(3, dtype=torch.int32)
    return ops.linear_max(leaf(128, 768), leaf(30522, 768), offsets, linear_bias=leaf(30522))


def packing():
    batch = PackedBatch(integers(100), gpu_cases.empty(3, dtype=torch.int32), 64, (2, 64))
    return ops.unpack(ops.pack(leaf(2, 64, 768), batch)[0], batch)


def rotary():
    tables = [gpu_cases.empty(512, 64, dtype=torch.float32) for _ in range(2)]
    return ops.rotary(leaf(128, 3, 12, 64), *tables, row_ids=integers(128), rotated=2)


STEPS = [
    attention,
    packed_attention,
    attention_of_chosen_queries,
    norms,
    elementwise,
    embeddings,
    loss,
    linear_loss,
    log_probs,
    pooled_maxima,
    packing,
    rotary,
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_forward_and_backward_read_nothing_back(step, tape):
    launched = aot.specialisations(lambda: play(step, tape), "sm90")
    assert len(launched) >= 2, f"the step launched {launched}"


def test_a_value_read_back_is_noticed(tape):
    def step():
        out = norms()
        return out * float(out.sum())

    # A CPU build of torch stops earlier than the fake tensor does.
    with pytest.raises((DataDependentOutputException, RuntimeError), match="item|not linked with support for cuda"):
        aot.specialisations(lambda: play(step, tape), "sm90")
