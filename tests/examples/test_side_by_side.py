"""Two trainings taking turns: neither sees the other's generator, and batches are shared."""

import psutil
import pytest
import side_by_side
import torch
from side_by_side import Side


def _side(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(model, optimizer, scheduler, batch):
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return Side(model, optimizer, None, step, seed)


def _batches():
    return list(torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(1)))


def test_taking_turns_changes_nothing_for_either_side():
    alone = _side()
    for batch in _batches():
        alone.step(batch)
    first, second = _side(), _side(seed=1)
    assert len(list(side_by_side.take_turns(first, second, _batches()))) == 6
    assert first.losses == alone.losses
    assert second.losses != alone.losses
    assert len(first.seconds) == len(second.seconds) == 6


def test_loss_differences_of_the_same_training_are_zero():
    assert side_by_side.loss_differences(_side(), _side(), _batches()) == [0.0] * 6


def test_loss_differences_of_different_trainings_are_not():
    assert max(side_by_side.loss_differences(_side(), _side(seed=1), _batches())) > 0


def test_peak_memory_counts_what_is_held_and_let_go():
    before = side_by_side.peak_memory()
    block = bytearray(before - psutil.Process().memory_info().rss + 2**26)  # 64 MiB more than this process ever held
    block[::4096] = b"x" * len(block[::4096])
    del block
    assert side_by_side.peak_memory() > before + 2**25


def test_smooth_keeps_a_constant_and_its_length():
    assert side_by_side.smooth([2.0] * 5) == pytest.approx([2.0] * 5)
    assert side_by_side.smooth([]) == []


def test_plot_writes_a_picture(tmp_path):
    curves = {"stock": ([0.5] * 9, [3.0, 2.5, 2.0] * 3), "fasttune": ([0.3] * 9, [3.1, 2.4, 2.1] * 3)}
    panel = {"title": "BERT", "subtitle": "small", "speedup": 1.5, "curves": curves}
    side_by_side.plot(tmp_path / "folder" / "demo.png", [panel, panel])
    assert (tmp_path / "folder" / "demo.png").read_bytes().startswith(b"\x89PNG")
