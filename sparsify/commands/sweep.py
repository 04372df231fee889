"""`python -m sparsify.sweep table=table1`: run the missing cells of a table, part by part, in one process.

They are planned by `runs.menu` and run by Hydra.

Also the filters that any `python -m sparsify -m ...` puts in front of its launcher.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from hydra_filter_sweeper import AbstractFilter
from omegaconf import DictConfig, OmegaConf

from sparsify.commands import cli, plan
from sparsify.commands.cli import INTERRUPTED
from sparsify.errors import DataError, UsageError
from sparsify.runs import console, identity, planning, request
from sparsify.runs.planning import Part, PlannedCell

USAGE = """python -m sparsify.sweep [table=NAME] [overrides]

Run the missing cells of a table, or of a sweep, in one process; finished cells are skipped.
  python -m sparsify.sweep table=table1
  python -m sparsify.sweep table=table1 scale=paper model=llama2-7b
  python -m sparsify.sweep table=table1 hydra/launcher=slurm      cells as jobs of a cluster
Overrides are those of python -m sparsify; see its --help. First: python -m sparsify.plan table=NAME"""


class _CellFilter(AbstractFilter):  # type: ignore[misc]
    """A filter that sees the job's config (the plug-in hands it over as plain dicts)."""

    @property
    def cell(self) -> identity.Config:
        config = OmegaConf.create(self.config)
        assert isinstance(config, DictConfig)
        return identity.plain(config)

    def state(self) -> str:
        """What the store knows; `refused` where the cell itself will say why it cannot be, while others go on."""
        try:
            request.check(self.cell)
            return planning.state_of(self.cell, *identity.keys(self.cell))
        except (UsageError, DataError):
            return "refused"


class Done(_CellFilter):
    """Drops cells whose record has every evaluation asked for."""

    def filter(self) -> bool:
        return self.state() == "done"

    def reason(self) -> str:
        return "done"


class InFlight(_CellFilter):
    """Drops cells that a living process holds."""

    def filter(self) -> bool:
        return self.state() == "running"

    def reason(self) -> str:
        return "another process works on it"


class Illegal(_CellFilter):
    """Drops cells outside the allocator's bounds; said aloud unless a table's grid asked for them."""

    def filter(self) -> bool:
        error = None if self.state() == "refused" else planning.illegal(self.cell)
        if error is not None and self.cell["sweep"]["of"] is None:
            console.warn(f"skipped: {error.paragraph()}")
        return error is not None

    def reason(self) -> str:
        return "outside the allocator's bounds"


POLL_SECONDS = 5.0


def run(table: str | None, overrides: list[str]) -> int:
    """Run what is missing, wait for what others work on, take over what they leave; the exit code of the worst part.

    Args:
        table: a name under `configs/table`, or None for the one sweep of the overrides.
        overrides: Hydra overrides added to every part.
    """
    parts = planning.parts_of(table, overrides)
    plan.show(parts, table)
    cli.refuse_nothing(parts)
    code, tried, waiting = 0, set[str](), 0
    while code != INTERRUPTED:
        missing = {cell.key for part in parts for cell in part.missing}
        held = sum(cell.state == "running" for part in parts for cell in part.cells)
        if missing - tried:
            tried |= missing
            code = max(code, _launch(parts))
        elif held:
            if held != waiting:
                console.say(f"waiting for {console.counted(held, 'cell')} that other processes work on")
            waiting = held
            time.sleep(POLL_SECONDS)
        else:
            break
        parts = planning.parts_of(table, overrides)
    return max(code, cli.unfinished(parts, table, overrides))


def _launch(parts: Sequence[Part]) -> int:
    counts = [len(part.missing) for part in planning.distinct(parts)]
    code, first, started = 0, 0, time.time()
    for part, count in zip(parts, counts, strict=True):
        if any(map(_left, part.missing)):
            progress = [f"sweep.of={sum(counts)}", f"sweep.first={first}", f"sweep.started={started}"]
            code = max(code, cli.launch(["-m", *part.overrides, *progress]))
        first += count
        if code == INTERRUPTED:
            break
    return code


def _left(cell: PlannedCell) -> bool:
    """Whether a cell that was missing still is: a part before its own may have run it, with more measurements."""
    return planning.state_of(cell.config, cell.key, cell.evaluation_keys) in ("missing", "failed")


def main(arguments: list[str]) -> int:
    """Run a table or a sweep; the exit code of the worst cell."""
    return cli.command(USAGE, run, arguments)
