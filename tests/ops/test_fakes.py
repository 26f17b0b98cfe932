"""What tracing is told of the backward operators' results is what they return, whichever gradients are asked for."""

import itertools

import pytest
import torch
from fused import FUSED, needs_fused
from torch._subclasses.fake_tensor import FakeTensorMode

from fasttune.ops._attention_call import Call

ROWS, COLUMNS, CLASSES = 5, 24, 9


def operators():
    """Name -> (arguments before the flags that say what is needed, how many flags)."""
    x, dout, residual = (torch.randn(ROWS, COLUMNS, dtype=torch.bfloat16) for _ in range(3))
    weight, bias, statistics = torch.randn(COLUMNS), torch.randn(COLUMNS), torch.rand(2, ROWS)
    seed, target = torch.tensor([3]), torch.arange(ROWS)
    classes, class_bias = torch.randn(CLASSES, COLUMNS), torch.randn(CLASSES)
    library = torch.ops.fasttune
    norm = (dout, residual, x, weight, bias, statistics, None, seed, 0.2, torch.bfloat16)
    linear = (x, classes, target, class_bias, None)
    log_prob = (x, classes, target, class_bias, torch.rand(ROWS, 3), 0.5, -100)
    packed = [torch.randn(2, 7, 3, 16) for _ in range(3)]
    call = Call(scale=0.25, bias=torch.randn(3, 5))
    out, lse = library.attention(*packed, *call, FUSED)
    attention = (torch.randn(2, 7, 3, 16), *packed, out, lse, *call)
    maximum = (torch.randn(2, CLASSES).bfloat16(), x, classes, class_bias, torch.tensor([0, 2, ROWS]))
    return {
        "bias_gelu_backward": ((dout, x, bias, False), 2),
        "bias_activation_backward": ((dout, x, bias, 3), 2),
        "gated_activation_backward": ((dout, x, residual, torch.randn(2 * COLUMNS), 3), 3),
        "layer_norm_backward": (norm, 4),
        "layer_norm_gelu_backward": ((dout, x, weight, bias, statistics, False), 3),
        "gelu_layer_norm_backward": ((dout, x, weight, bias, statistics, False), 3),
        "linear_cross_entropy": ((*linear, None, 1.0, -100, 0.0, 1), 3),
        "linear_cross_entropy_backward": ((torch.rand(ROWS), *linear, -100, 0.0), 3),
        "linear_log_prob_backward": ((torch.rand(ROWS), None, torch.rand(ROWS), None, *log_prob), 3),
        "linear_max_backward": ((*maximum, library.linear_max(*maximum[1:], FUSED)[1]), 3),
        "attention_backward": (attention, 6),
    }


NAMES = (
    *("bias_gelu_backward", "layer_norm_backward", "layer_norm_gelu_backward", "gelu_layer_norm_backward"),
    *("linear_cross_entropy", "linear_cross_entropy_backward", "linear_log_prob_backward", "linear_max_backward"),
    *("attention_backward", "bias_activation_backward", "gated_activation_backward"),
)


@needs_fused
@pytest.mark.parametrize("name", NAMES)
def test_fakes_tell_the_shapes_of_what_is_needed_and_of_what_is_not(name):
    arguments, flags = operators()[name]
    operator = getattr(torch.ops.fasttune, name).default
    for needs in itertools.product((False, True), repeat=flags):
        wanted = [list(needs)] if name == "attention_backward" else needs
        real = operator(*arguments, *wanted, FUSED)
        with FakeTensorMode() as mode:
            inputs = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
            fake = operator(*inputs, *wanted, FUSED)
        for i, (told, returned) in enumerate(zip(fake, real, strict=True)):
            assert told.shape == returned.shape, f"needs {needs}: result {i}"
            if returned.numel():  # what is not needed is not looked at
                assert told.dtype == returned.dtype, f"needs {needs}: result {i}"
                assert told.stride() == returned.stride(), f"needs {needs}: result {i}"
