"""What of a record goes to wandb, by a stand-in that remembers it."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from sparsify.runs.record import Record
from sparsify.runs.tracking import Wandb, loss_curve, step_curves, step_rows

LAYERS = [{"name": f"blocks.{i}.layer", "block": i, "zeros": 7, "numel": 10, "error": 0.5, "notes": {}} for i in (0, 1)]
STEPS = {
    "loss": [4.0, 3.0, 3.5, 2.0],
    "step_sparsity": [0.5, 0.7],
    "step_trainable": [100, 120],
    "step_block_sparsity": [[0.4, 0.6], [0.65, 0.75]],
    "step_ranks": [[6, 6], [9, 5]],
    "step_reconstruction": [[0.1, 0.3], [0.2, 0.4]],
}


def record(notes):
    return Record("k" * 16, "done", {"model": {"name": "tiny"}}, {}, sparsity=0.7, layers=LAYERS, notes=notes)


@pytest.fixture
def logged(monkeypatch):
    """What was logged, point by point, and by which axes it is drawn."""
    points, axes = [], {}
    run = SimpleNamespace(
        summary={},
        log=points.append,
        define_metric=lambda name, step_metric: axes.update({name: step_metric}),
        finish=lambda: None,
    )
    wandb = ModuleType("wandb")
    wandb.init, wandb.Table = lambda **_: run, lambda columns, data: (columns, data)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return SimpleNamespace(points=points, axes=axes)


def test_loss_sparsity_and_ranks_by_step_and_block_are_logged(logged):
    Wandb().log(record(STEPS))
    assert logged.axes == {"training/*": "training/step", "step/*": "step/step"}
    losses = [(point["training/step"], point["training/loss"]) for point in logged.points if "training/loss" in point]
    assert losses == [(1, 4.0), (2, 3.0), (3, 3.5), (4, 2.0)]
    first, second = (point for point in logged.points if "step/step" in point)
    assert second == {
        "step/step": 2,
        "step/sparsity": 0.7,
        "step/trainable": 120,
        "step/sparsity/block_00": 0.65,
        "step/sparsity/block_01": 0.75,
        "step/rank/block_00": 9,
        "step/rank/block_01": 5,
        "step/reconstruction/block_00": 0.2,
        "step/reconstruction/block_01": 0.4,
    }
    assert first["step/rank/block_01"] == 6
    (table,) = (point["steps"] for point in logged.points if "steps" in point)
    assert table[0] == ["step", "block", "sparsity", "rank", "reconstruction"]
    assert table[1] == [[1, 0, 0.4, 6, 0.1], [1, 1, 0.6, 6, 0.3], [2, 0, 0.65, 9, 0.2], [2, 1, 0.75, 5, 0.4]]


def test_a_recovery_has_its_loss_and_no_steps(logged):
    Wandb().log(record({"recovery.loss": [2.0, 1.0]}))
    assert [point["training/loss"] for point in logged.points if "training/loss" in point] == [2.0, 1.0]
    assert not any("steps" in point or "step/step" in point for point in logged.points)


def test_a_block_without_adapter_has_a_sparsity_and_no_rank():
    rows = step_rows(record(STEPS | {"step_ranks": [[6], [9]]}))
    assert [row.get("rank") for row in rows] == [6, None, 9, None]
    assert [row["sparsity"] for row in rows] == [0.4, 0.6, 0.65, 0.75]


def test_a_cell_that_was_not_trained_has_no_curves():
    assert loss_curve(record({})) == step_curves(record({})) == step_rows(record({})) == []
