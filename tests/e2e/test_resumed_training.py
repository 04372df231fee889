"""Cells that train, by the command line: killed ones go on to the same numbers, failing ones keep their checkpoint."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest

from sparsify.recovery.training import Trainer

LOSA = (
    "method=losa",
    "pruner=sparsegpt",  # which changes the weights that it keeps
    "method.steps=3",
    "allocator=similarity",
    "calibration.windows=4",
    "tuning.windows=12",
    "tuning.seqlen=16",
    "method.schedule.batch=2",
    "method.schedule.rate=0.01",
)
KILLED = """
import os, signal, sys
from sparsify.commands.cli import launch
from sparsify.methods.checkpoint import Checkpoint

save, saves = Checkpoint.save, []

def deadly(self, state):
    save(self, state)
    saves.append(self.file.name)
    if saves.count("checkpoint.pt") == 2:
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoint.save = deadly
launch(sys.argv[1:])
"""


@pytest.fixture
def trained(monkeypatch):
    """Steps of the optimiser of every training in this process."""
    counts, run = [], Trainer.run

    def spy(self, *arguments):
        losses = run(self, *arguments)
        counts.append(len(losses))
        return losses

    monkeypatch.setattr(Trainer, "run", spy)
    return counts


def measured(record):
    """All numbers that do not depend on when and how fast it ran."""
    return [
        {name: item["value"] for name, item in record["evaluations"].items()},
        record["sparsity"],
        record["notes"]["loss"],
        record["notes"]["step_ranks"],
        [(row["zeros"], row["error"]) for row in record["layers"]],
    ]


def test_after_kill_9_training_goes_on_to_the_same_perplexity(tiny, results, go, records, trained):
    assert go(*LOSA, f"results={results}/whole").code == 0
    (whole,) = results.glob("whole/runs/*/record.json")
    command = [sys.executable, "-c", KILLED, *tiny, f"results={results}", *LOSA]
    run = subprocess.run(command, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert run.returncode == -signal.SIGKILL
    assert not records()
    assert list(results.glob("runs/*/checkpoint.pt"))

    steps = trained.copy()
    assert go(*LOSA).code == 0
    assert steps == [1, 1, 4]
    assert trained == [*steps, 4]  # the last step alone
    assert measured(records()[0.5]) == measured(json.loads(whole.read_text()))
    assert not list(results.glob("runs/*/checkpoint*"))


def test_a_loss_that_is_not_finite_stops_the_cell_and_keeps_its_checkpoint(results, go, records, monkeypatch, trained):
    backward, calls = Trainer._backward, []

    def spoilt(self, *arguments):
        calls.append(1)
        lowered = backward(self, *arguments)
        return math.inf if len(calls) == 4 else lowered

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_backward", spoilt)
        run = go(*LOSA)
    assert run.code == 1
    assert run.err.count("\n") == 1
    assert "inf at step 2 of 4, learning rate 0.005, in step 3 of 3" in run.err
    assert records()[0.5]["status"] == "failed"
    assert list(results.glob("runs/*/checkpoint.pt"))

    assert go(*LOSA).code == 0
    assert trained == [1, 1, 4]  # the first two before the failure
    assert records()[0.5]["status"] == "done"
