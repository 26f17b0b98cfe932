"""What keeps the CUDA library from running is said exactly, and the library loads where it cannot run."""

import pytest
import torch

from fasttune import ops
from fasttune.ops import _backends, _cuda


class Library:
    """Stands for a library that was built."""

    def __init__(self, problem=""):
        self.problem = lambda: problem


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    monkeypatch.setattr(_backends, "_chosen", {})


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(_cuda, "library", None)
    monkeypatch.setattr(_cuda, "unavailable_reason", "the compiled CUDA library is not there (for a test)")
    with pytest.raises(RuntimeError, match="'cuda' was asked for layer_norm, but the compiled CUDA library"):
        ops.layer_norm(torch.randn(2, 8), None, None, backend="cuda")


def test_tensors_elsewhere(monkeypatch):
    monkeypatch.setattr(_cuda, "library", Library())
    with pytest.raises(RuntimeError, match="the cuda backend runs on CUDA tensors, these are on cpu"):
        ops.layer_norm(torch.randn(2, 8), None, None, backend="cuda")


@pytest.mark.parametrize(
    ("built_for", "found", "capability", "problem", "reason"),
    [
        (None, False, None, "", "no CUDA device is available: this torch is a CPU build"),
        ("13.0", False, None, "the driver is too old", "no CUDA device is available (the driver is too old)"),
        ("13.0", True, (7, 5), "", "the kernels need compute capability 8.0 or newer, this GPU has 7.5"),
        ("13.0", True, (9, 0), "the driver is too old", "the driver is too old"),
        ("13.0", True, (9, 0), "", None),
    ],
)
def test_machines(monkeypatch, built_for, found, capability, problem, reason):
    monkeypatch.setattr(_cuda, "library", Library(problem))
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert _cuda.why_not("cuda") == reason


def test_auto_takes_it_where_it_was_measured_to_win(monkeypatch):
    monkeypatch.setattr(_backends, "why_not", lambda operation, backend, *where: None)
    assert _backends._decide("bias_gelu", "cuda", torch.float32, None, None) == "triton"
    monkeypatch.setattr(_backends, "CUDA_BEATS_TRITON", frozenset({"bias_gelu"}))
    assert _backends._decide("bias_gelu", "cuda", torch.float32, None, None) == "cuda"
    assert _backends._decide("bias_gelu", "cpu", torch.float32, None, None) == "cpp"
    monkeypatch.setattr(_backends, "why_not", lambda operation, backend, *where: "" if backend == "cuda" else None)
    assert _backends._decide("bias_gelu", "cuda", torch.float32, None, None) == "triton"


def test_the_operations_that_have_it():
    having = {name for name in _backends.operations() if "cuda" in _backends._implemented[name]}
    assert having == {
        *("attention", "layer_norm", "dropout_add_layer_norm"),
        *("layer_norm_gelu", "gelu_layer_norm", "bias_gelu", "dropout", "cross_entropy", "linear_log_prob"),
        "rotary",
        *("bias_activation", "gated_activation"),
    }


@pytest.mark.skipif(_cuda.library is None, reason=_cuda.unavailable_reason)
def test_the_library_loads_here_and_says_what_is_missing():
    assert _cuda.library.max_norm_columns == 8192
    if not torch.cuda.is_available():
        assert "CUDA" in _cuda.library.problem()
