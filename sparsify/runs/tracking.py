"""Sinks for finished records. The record on disk is the result; a sink that fails is a warning."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from sparsify.runs import console
from sparsify.runs.record import Record


@runtime_checkable
class Tracker(Protocol):
    """Somewhere that finished records are shown."""

    def log(self, record: Record) -> None:
        """Send a finished record somewhere; must not raise."""


@dataclass(frozen=True)
class NoTracker:
    """Keeps records on disk only."""

    def log(self, record: Record) -> None:
        pass


@dataclass(frozen=True)
class Wandb:
    """One wandb run per record: config, metrics, the per-layer table, curves over depth and of training.

    Attributes:
        project: wandb project.
        mode: `offline` unless told otherwise, so that no key and no network are needed.
        folder: where offline runs are kept.
    """

    project: str = "layerwise-sparsity"
    mode: Literal["online", "offline", "disabled"] = "offline"
    folder: str = "results"

    def log(self, record: Record) -> None:
        """Write the record to wandb; whatever goes wrong becomes one warning line."""
        try:
            self._send(record)
        except Exception as error:
            console.warn(f"wandb was not written ({type(error).__name__}: {error}); the record itself is safe")

    def _send(self, record: Record) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        run = wandb.init(
            project=self.project,
            dir=self.folder,
            mode=self.mode,
            id=record.key,
            config=record.science,
            resume="allow",
            reinit="finish_previous",
        )
        try:
            run.summary.update(metrics(record))
            rows = layer_rows(record)
            run.log({"layers": wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])})
            for step, values in enumerate(block_curves(record)):
                run.log({"block": step, **values})
            for trial in record.trials:
                run.log({f"trial/{name}": value for name, value in trial.items()})
            for axis, points in {"training": loss_curve(record), "step": step_curves(record)}.items():
                run.define_metric(f"{axis}/*", step_metric=f"{axis}/step")
                for point in points:
                    run.log(point)
            if steps := step_rows(record):
                columns = ["step", "block", *BY_BLOCK]
                data = [[row.get(column) for column in columns] for row in steps]
                run.log({"steps": wandb.Table(columns=columns, data=data)})
        finally:
            run.finish()


def metrics(record: Record) -> dict[str, float]:
    """Flat numbers of a record: every evaluation, the sparsity, the timings."""
    values = {f"{name}/{item.result.metric}": item.result.value for name, item in record.evaluations.items()}
    return values | {"sparsity": record.sparsity} | {f"seconds/{k}": v for k, v in record.seconds.items()}


def layer_rows(record: Record) -> list[dict[str, Any]]:
    """The per-layer table without the pruners' remarks."""
    return [{k: v for k, v in row.items() if k != "notes"} for row in record.layers]


def block_curves(record: Record) -> list[dict[str, float]]:
    """Sparsity and mean output error of each block."""
    blocks: dict[int, list[Mapping[str, Any]]] = {}
    for row in record.layers:
        blocks.setdefault(row["block"], []).append(row)
    return [
        {
            "curve/sparsity": sum(r["zeros"] for r in rows) / sum(r["numel"] for r in rows),
            "curve/error": sum(r["error"] for r in rows) / len(rows),
        }
        for rows in (blocks[i] for i in sorted(blocks))
    ]


Point = dict[str, float | int]
"""Numbers by name."""
TOTALS = {"sparsity": "step_sparsity", "trainable": "step_trainable"}
"""What a method of several steps notes of each, by what it is called here."""
BY_BLOCK = {"sparsity": "step_block_sparsity", "rank": "step_ranks", "reconstruction": "step_reconstruction"}
"""What it notes of each step and block."""


def loss_curve(record: Record) -> list[Point]:
    """The training loss, in nats per token, by step of the optimiser: of a method that trains, or of the recovery."""
    losses = record.notes.get("loss", record.notes.get("recovery.loss", []))
    return [{"training/step": step, "training/loss": loss} for step, loss in enumerate(losses, start=1)]


def step_rows(record: Record) -> list[Point]:
    """A row for every step of the method and block, with what was noted of it."""
    rows: dict[tuple[int, int], Point] = {}
    for name, note in BY_BLOCK.items():
        for step, values in enumerate(record.notes.get(note, []), start=1):
            for block, value in enumerate(values):
                rows.setdefault((step, block), {"step": step, "block": block})[name] = value
    return list(rows.values())


def step_curves(record: Record) -> list[Point]:
    """Totals of every step of the method, and a curve over the steps for each block."""
    points: dict[float | int, Point] = {}
    for name, note in TOTALS.items():
        for step, value in enumerate(record.notes.get(note, []), start=1):
            points.setdefault(step, {"step/step": step})[f"step/{name}"] = value
    for row in step_rows(record):
        curves = {f"step/{name}/block_{row['block']:02d}": row[name] for name in BY_BLOCK if name in row}
        points.setdefault(row["step"], {"step/step": row["step"]}).update(curves)
    return list(points.values())
