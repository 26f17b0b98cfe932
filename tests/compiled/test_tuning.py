"""FASTTUNE_AUTOTUNE: timed once for a kind, kept on disk for a device and version, and off unless asked for."""

import json

import aot
import gpu_cases
import pytest
import torch
from triton.runtime.errors import OutOfResources

from fasttune.kernels import attention, tuning
from fasttune.ops._attention_call import Call

DEVICE = torch.device("cuda")


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """Tuning on a machine without a GPU: a list of what was timed; a candidate's time is the candidate."""
    timed = []

    def milliseconds(launch):
        timed.append(launch())
        return float(timed[-1])

    monkeypatch.setenv("FASTTUNE_AUTOTUNE", "1")
    monkeypatch.setenv("FASTTUNE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "_winners", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return timed


def choose(kind, default=5, candidates=(7, 3, 5)):
    return tuning.choose(kind, default, candidates, lambda tile: tile, DEVICE)


def test_the_fastest_is_kept_in_the_process_and_on_disk(tuned, tmp_path, monkeypatch):
    assert choose("a kind") == 3
    assert tuned == [5, 7, 3]
    assert choose("a kind") == 3
    monkeypatch.setattr(tuning, "_winners", {})  # another process
    assert choose("a kind") == 3
    assert len(tuned) == 3
    assert choose("another kind") == 3
    assert len(tuned) == 6
    (file,) = tmp_path.iterdir()
    assert "nvidia-h100-80gb-hbm3-triton" in file.name
    assert json.loads(file.read_text()) == {"a kind": "3", "another kind": "3"}


def test_it_is_off_unless_asked_for(tuned, monkeypatch):
    monkeypatch.delenv("FASTTUNE_AUTOTUNE")
    assert choose("a kind") == 5
    assert not tuned


def test_nothing_is_timed_inside_a_captured_graph(tuned, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose("a kind") == 5
    assert not tuned


def test_what_does_not_fit_is_passed_over(tuned):
    def launch(tile):
        if tile == 3:
            raise OutOfResources(300000, 232448, "shared memory")
        return tile

    assert tuning.choose("a kind", 5, (7, 3), launch, DEVICE) == 5


@pytest.mark.parametrize("content", ["", "[1]", '{"a kind": "11"}'])
def test_a_damaged_or_foreign_cache_does_no_harm(tuned, content):
    file = tuning.cache_file("NVIDIA H100 80GB HBM3")
    file.write_text(content)
    assert choose("a kind") in (3, 5)


def test_attention_asks_for_each_kernel_and_never_for_a_batch(tuned, monkeypatch):
    monkeypatch.setattr(tuning, "_milliseconds", lambda launch: tuned.append(launch()) or 1.0)

    def step(batch):
        query = gpu_cases.empty(batch, 64, 2, 64, dtype=torch.bfloat16)
        asked = Call(causal=True, scale=0.125)
        out, lse = attention.forward(query, query, query, asked)
        gradients = [*(torch.empty_like(query) for _ in range(3)), None, None, None]
        attention.backward(out, (query, query, query, out, lse), gradients, asked)

    aot.specialisations(lambda: step(2), "sm90")
    first = len(tuned)
    assert first > 6
    aot.specialisations(lambda: step(3), "sm90")
    assert len(tuned) == first
    assert len(next(iter(tuning._winners.values()))) == 3
