"""The evaluations of a cell, one by one: each is on disk as soon as it is there, and one that fails stops no other."""

from dataclasses import replace

from sparsify.cells import recording
from sparsify.cells.cell import Cell
from sparsify.cells.clock import Clock
from sparsify.evaluation.base import Evaluator, Subject
from sparsify.runs import console
from sparsify.runs.record import Record, Recorded
from sparsify.types import Evaluation


def check(cell: Cell, subject: Subject) -> None:
    """Refuse, before the model is pruned, what could not be measured after it.

    Raises:
        Exception: what an evaluation lacks, or a summary of several.
    """
    lacking = dict[str, Exception]()
    for name, evaluator in cell.evaluators.items():
        try:
            evaluator.check(subject)
        except Exception as error:
            lacking[name] = error
    if lacking:
        raise recording.one_error(lacking)


def evaluate(cell: Cell, subject: Subject, record: Record, clock: Clock) -> Record:
    """The record with every evaluation of the cell that it did not have yet.

    Raises:
        Exception: what a failed evaluation raised, or a summary of several, when all others are in the store.
    """
    failed = dict[str, Exception]()
    for name, evaluator in cell.evaluators.items():
        if name in record.evaluations and record.evaluations[name].key == cell.evaluation_keys[name]:
            continue
        try:
            result = _measured(name, evaluator, subject, clock)
        except Exception as error:
            failed[name] = error
            continue
        record = recording.with_evaluation(record, name, Recorded(cell.evaluation_keys[name], result), clock.seconds)
        cell.store.write(record)
    if failed:
        raise recording.one_error(failed)
    return record


def _measured(name: str, evaluator: Evaluator, subject: Subject, clock: Clock) -> Evaluation:
    timing = clock.timing(name, subject.view.device)
    with console.progress(f"evaluating {name}", pause=20.0) as progress, timing:
        return evaluator.evaluate(replace(subject, progress=progress))
