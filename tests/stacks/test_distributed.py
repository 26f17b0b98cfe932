"""DDP and FSDP2 on two processes give the losses and gradients of one process; see two_processes.py for the cases."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import build
from runs import Run, assert_same_run, batches, exact_run
from two_processes import CASES, CLASSIFIER, WORLD

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All cases, run once in one pair of processes: starting it takes longer than they do."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = [ROOT, HERE, HERE.parent, HERE.parent / "patching"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "two_processes.py"), str(folder), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)
    return {name: torch.load(folder / f"{number}.pt") for number, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name, results):
    case, result = CASES[name], results[name]
    for side in ("stock", "ours"):
        assert "error" not in result[side], f"{side}: {result[side]['error']}"
    model = build(case.head)
    case.prepare(model)
    exact = exact_run(model, batches(case.head, case.parts), loss_of=case.loss_of)
    stock, ours = (Run(result[side]["losses"], result[side]["gradients"]) for side in ("stock", "ours"))
    assert_same_run(ours, stock, exact, case.dtype)
    assert any(runs for _, runs, _ in result["ours"]["report"])
    assert not result["stock"]["report"]
    assert result["ours"]["logits"] == 0  # what wraps a model must not have it compute logits that nobody reads
    note = "; ".join(note for _, runs, note in result["ours"]["report"] if runs.startswith("logits"))
    if name.startswith("fsdp2") and case.head != CLASSIFIER:
        assert "weights are sharded" in note
    followed = case.head != CLASSIFIER and ("static" in name or "unused" in name)
    assert ("DDP follows" in note) == followed
