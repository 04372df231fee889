"""One cell, from config to record: load, calibrate, prune, record, evaluate, finish. Read this file first.

The library call `sparsify.prune` is the third step alone, by the same code.
"""

from dataclasses import replace
from pathlib import Path

from sparsify.cells import kept, recording
from sparsify.cells.bench import Bench, bench_of
from sparsify.cells.cell import Cell
from sparsify.cells.clock import Clock
from sparsify.data.inputs import Inputs
from sparsify.methods.checkpoint import Checkpoint
from sparsify.recipe import prune_model
from sparsify.runs import console
from sparsify.runs.identity import Config
from sparsify.runs.record import Record, Recorded
from sparsify.runs.records import Store


def run_cell(config: Config) -> Record:
    """Run a cell unless its record is complete, and return the record.

    Raises:
        SparsifyError: what went wrong; a failed record is left behind unless there is a good one.
    """
    cell = Cell.of(config)
    store = Store(config["results"])
    fresh = not _is_finished(cell, store)
    if fresh:
        with store.lease(cell.key), recording.of_failure(cell, store):
            if not _is_finished(cell, store):  # by another process meanwhile
                _run(cell, store)
    return finish(cell, store, fresh)


def _run(cell: Cell, store: Store) -> None:
    clock, folder = Clock(), store.folder(cell.key)
    bench = load(cell, clock)
    calibration, heldout = calibrate(cell, bench)
    console.cell_started(cell.config, cell.key)
    old = store.read(cell.key)
    if old is not None and kept.intact(folder, old.kept):
        record = reload(bench, old, folder, clock)
    else:
        record = prune(cell, bench, calibration, heldout, folder, clock)
    record = recording.with_earlier(record, cell, old)
    store.write(record)
    evaluate(cell, bench, store, record, clock)


def load(cell: Cell, clock: Clock) -> Bench:
    """The dense model, from the cell before this one if it had the same."""
    with clock.timing("load"):
        bench = bench_of(cell)
        bench.restore()
    return bench


def calibrate(cell: Cell, bench: Bench) -> tuple[Inputs, Inputs]:
    """Calibration and held-out inputs."""
    seed = cell.config["seed"]
    return bench.inputs(cell.calibration, seed), bench.inputs(cell.heldout, seed)


def prune(cell: Cell, bench: Bench, calibration: Inputs, heldout: Inputs, folder: Path, clock: Clock) -> Record:
    """Allocate and prune as the method says, run the stages after it, and keep the model if that is asked for."""
    checkpoint = Checkpoint(folder)
    with console.progress("pruning") as progress, clock.timing("prune", bench.view.device):
        result = prune_model(
            bench.view,
            calibration,
            cell.recipe,
            heldout=heldout,
            batch_size=cell.config["batch_size"],
            snapshot=lambda: bench.dense,
            memo=bench.memo,
            seed=cell.config["seed"],
            progress=progress,
            checkpoint=checkpoint,
        )
    record = recording.of_pruning(cell, bench, calibration, result, clock.seconds)
    if cell.config["keep"]:
        record = replace(record, kept=kept.save(folder, bench.view, bench.dense, result.masks))
    checkpoint.clear()
    return record


def reload(bench: Bench, old: Record, folder: Path, clock: Clock) -> Record:
    """The model that was kept, instead of pruning again."""
    assert old.kept is not None
    with clock.timing("reload", bench.view.device):
        kept.load(folder, old.kept, bench.view)
    return replace(old, status="running", seconds=old.seconds | clock.seconds)


def evaluate(cell: Cell, bench: Bench, store: Store, record: Record, clock: Clock) -> None:
    """Add what the record does not have yet, writing it after each; one that fails does not stop the others."""
    subject, failed = bench.subject(cell), dict[str, Exception]()
    for name, evaluator in cell.evaluators.items():
        if name in record.evaluations:
            continue
        try:
            timing = clock.timing(name, bench.view.device)
            with console.progress(f"evaluating {name}", pause=20.0) as progress, timing:
                result = evaluator.evaluate(replace(subject, progress=progress))
        except Exception as error:
            failed[name] = error
            continue
        record = recording.with_evaluation(record, name, Recorded(cell.evaluation_keys[name], result))
        store.write(replace(record, seconds=record.seconds | clock.seconds))
    if failed:
        raise recording.one_error(failed)
    store.write(replace(record, status="done", seconds=record.seconds | clock.seconds))


def finish(cell: Cell, store: Store, fresh: bool) -> Record:
    """Show the record, and hand it to the tracker if it is new."""
    record = store.read(cell.key)
    assert record is not None
    console.cell_finished(cell.config, record, store.folder(cell.key) / "record.json", fresh)
    if fresh:
        cell.tracker.log(record)
    return record


def _is_finished(cell: Cell, store: Store) -> bool:
    return store.complete(cell.key, cell.evaluation_keys, kept=cell.config["keep"])
