"""A cell's record in the making: what a run adds, what it takes over from an earlier one, and what a failure leaves."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

from sparsify.cells.bench import Bench
from sparsify.cells.cell import Cell
from sparsify.data.inputs import Inputs
from sparsify.errors import RecordError, SparsifyError
from sparsify.model.walk import default_batch_size
from sparsify.recipe import PruneResult
from sparsify.runs import provenance
from sparsify.runs.record import Record, Recorded, Superseded


def is_complete(cell: Cell) -> bool:
    """Whether nothing is left to do."""
    return cell.store.complete(cell.key, cell.evaluation_keys, kept=cell.config["keep"])


def of_pruning(cell: Cell, bench: Bench, calibration: Inputs, result: PruneResult, seconds: dict[str, float]) -> Record:
    """The record after pruning, before any evaluation."""
    batch_size = cell.config["batch_size"] or default_batch_size(bench.view.device, calibration.length)
    return Record(
        key=cell.key,
        status="running",
        science=cell.science,
        execution=provenance.execution(cell.config)
        | {
            "windows_per_forward": batch_size,
            "model_commit": getattr(bench.loaded.model.config, "_commit_hash", None),
            "model": cell.config["model"],
        },
        sparsity=result.sparsity,
        ledger={**asdict(result.plan.ledger), "achieved": result.sparsity},
        trials=[dict(trial) for trial in result.plan.trials],
        notes=dict(result.notes),
        plan=result.plan.to_rows(),
        skipped=[asdict(matrix) | {"shape": list(matrix.shape)} for matrix in result.skipped],
        layers=result.to_rows(),
        calibration=calibration.provenance,
        seconds=seconds,
    )


def with_earlier(record: Record, cell: Cell, old: Record | None) -> Record:
    """The record with all evaluations of an earlier run of this cell, until others take their place.

    A setting that comes back (no limit after a limited look) finds its old result among those that were superseded.
    """
    if old is None:
        return record
    took = {name: old.seconds[name] for name in old.evaluations if name in old.seconds}
    seconds = took | record.seconds
    record = replace(record, evaluations=dict(old.evaluations), superseded=list(old.superseded), seconds=seconds)
    for item in old.superseded:
        if cell.evaluation_keys.get(item.name) == item.evaluation.key:
            record = replace(record, superseded=[other for other in record.superseded if other is not item])
            record = with_evaluation(record, item.name, item.evaluation, seconds)
    return record


def with_evaluation(record: Record, name: str, evaluation: Recorded, seconds: dict[str, float]) -> Record:
    """The record with one evaluation more, and what every step took so far; it supersedes one of other settings."""
    before = record.evaluations.get(name)
    gone = [Superseded(name, before)] if before is not None and before.key != evaluation.key else []
    return replace(
        record,
        evaluations={**record.evaluations, name: evaluation},
        superseded=record.superseded + gone,
        seconds=record.seconds | seconds,
    )


@contextmanager
def of_failure(cell: Cell) -> Iterator[None]:
    """Say in the store what failed inside, unless that would replace results or the store is what failed."""
    try:
        yield
    except RecordError:
        raise
    except Exception as error:
        old = cell.store.read(cell.key)
        if old is not None and old.evaluations:
            cell.store.write(replace(old, status="done"))  # complete for what it has; what failed is still missing
        else:
            cell.store.write(_failed(cell, error))
        raise


def _failed(cell: Cell, error: Exception) -> Record:
    message = error.paragraph() if isinstance(error, SparsifyError) else f"{type(error).__name__}: {error}"
    return Record(
        key=cell.key,
        status="failed",
        science=cell.science,
        execution=provenance.execution(cell.config),
        error=message,
        traceback="".join(traceback.format_exception(error)),
    )


def one_error(failed: dict[str, Exception]) -> Exception:
    """The error of a cell whose evaluations failed: what they all say, or a summary."""
    first = next(iter(failed.values()))
    said = {name: f"{type(error).__name__}: {' '.join(str(error).split())}" for name, error in failed.items()}
    if len(set(said.values())) == 1:
        return first
    summary = SparsifyError(
        f"{len(failed)} evaluations failed",
        got="; ".join(f"{name}: {text}" for name, text in said.items()),
        fix="the same command again, once these are repaired: what has been measured is kept",
    )
    summary.__cause__ = first
    return summary
