"""One cell, from config to record, in six steps: load, calibrate, prune, record, evaluate, finish. Read this first.

The library call `sparsify.prune` is the third step alone, by the same code.
"""

import os
from dataclasses import replace

from sparsify.cells import evaluating, kept, recording
from sparsify.cells.bench import Bench, bench_of
from sparsify.cells.cell import Cell
from sparsify.cells.clock import Clock
from sparsify.data.inputs import Inputs
from sparsify.errors import UsageError
from sparsify.methods.checkpoint import Checkpoint
from sparsify.recipe import PruneResult, prune_model
from sparsify.runs import console
from sparsify.runs.identity import Config
from sparsify.runs.record import Record


def run_cell(config: Config) -> Record:
    """Run a cell unless its record is complete, and return the record.

    Raises:
        SparsifyError: what went wrong; a failed record is left behind unless there is a good one.
    """
    _refuse_several()
    cell = Cell.of(config)
    fresh = not recording.is_complete(cell)
    if fresh:
        with cell.store.lease(cell.key), recording.of_failure(cell):
            if not recording.is_complete(cell):  # by another process meanwhile
                _run(cell, Clock())
    return finish(cell, fresh)


def _refuse_several() -> None:
    """Several processes would each write the record of the same cell."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "A cell is run by one process",
            got=f"WORLD_SIZE={os.environ['WORLD_SIZE']}, as accelerate and torchrun set it",
            fix="python -m sparsify without them; to train one model on several, call sparsify.prune under accelerate",
        )


def _run(cell: Cell, clock: Clock) -> None:
    bench = load(cell, clock)
    written = kept.reloaded(cell, bench, clock)
    if written is None:
        calibration, heldout = calibrate(cell, bench)
        evaluating.check(cell, bench.subject(cell))
        result = prune(cell, bench, calibration, heldout, clock)
        written = record(cell, bench, calibration, result, clock)
    evaluate(cell, bench, written, clock)


def load(cell: Cell, clock: Clock) -> Bench:
    """The dense model, from the cell before this one if it had the same."""
    with clock.timing("load"):
        bench = bench_of(cell)
        bench.restore()
    console.cell_started(cell.config, cell.key)
    return bench


def calibrate(cell: Cell, bench: Bench) -> tuple[Inputs, Inputs]:
    """Calibration inputs, which statistics are taken on, and held-out ones, which searches score on."""
    seed = cell.config["seed"]
    return bench.inputs(cell.calibration, seed), bench.inputs(cell.heldout, seed)


def prune(cell: Cell, bench: Bench, calibration: Inputs, heldout: Inputs, clock: Clock) -> PruneResult:
    """Allocate and prune as the method says, and run the stages after it."""
    with console.progress("pruning") as progress, clock.timing("prune", bench.view.device):
        return prune_model(
            bench.view,
            calibration,
            cell.recipe,
            heldout=heldout,
            batch_size=cell.config["batch_size"],
            snapshot=lambda: bench.dense,
            memo=bench.memo,
            seed=cell.config["seed"],
            progress=progress,
            checkpoint=Checkpoint(cell.folder),
            inputs=lambda spec: bench.inputs(spec, cell.config["seed"]),
        )


def record(cell: Cell, bench: Bench, calibration: Inputs, result: PruneResult, clock: Clock) -> Record:
    """Write what pruning did, the model itself if it is to be kept, and what an earlier run of this cell measured."""
    written = recording.of_pruning(cell, bench, calibration, result, clock.seconds)
    if cell.config["keep"]:
        written = replace(written, kept=kept.save(cell.folder, bench.view, bench.dense, result.masks, result.grids))
    written = recording.with_earlier(written, cell, cell.store.read(cell.key))
    cell.store.write(written)
    Checkpoint(cell.folder).clear()
    return written


def evaluate(cell: Cell, bench: Bench, written: Record, clock: Clock) -> None:
    """Measure what the record does not have yet, and write each measurement as soon as it is there."""
    done = evaluating.evaluate(cell, bench.subject(cell), written, clock)
    cell.store.write(replace(done, status="done", seconds=done.seconds | clock.seconds))


def finish(cell: Cell, fresh: bool) -> Record:
    """Show the record, and hand it to the tracker if it is new."""
    finished = cell.store.read(cell.key)
    assert finished is not None
    console.cell_finished(cell.config, finished, cell.folder / "record.json", fresh)
    if fresh:
        cell.tracker.log(finished)
    return finished
