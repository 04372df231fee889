"""`python -m sparsify.plan table=table1`: what is done, running, failed or missing, and how long the rest takes.

Runs nothing and imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from sparsify.commands import cli
from sparsify.runs import console, labels
from sparsify.runs.cost import Costs
from sparsify.runs.planning import Part, PlannedCell, distinct, parts_of
from sparsify.runs.records import Store

USAGE = """python -m sparsify.plan [table=NAME] [overrides]

What is done, running, failed or missing of a table, or of a sweep; runs nothing.
  python -m sparsify.plan table=table1
  python -m sparsify.plan table=table1 scale=paper model=llama2-7b
  python -m sparsify.plan allocator=uniform,owl,atp sparsity=0.5,0.6,0.7
Overrides are those of python -m sparsify; see its --help."""


def show(parts: Sequence[Part], table: str | None) -> None:
    """Print counts, what is left, and the expected time."""
    parts = distinct(parts)
    cells = [cell for part in parts for cell in part.cells]
    counts = Counter(cell.state for cell in cells)
    summary = ", ".join(f"{counts[s]} {s}" for s in ("done", "running", "failed", "missing", "illegal") if counts[s])
    console.say(f"[bold]{table or 'sweep'}[/]: {console.counted(len(cells), 'cell')}: {summary or 'none'}")
    if left := [cell for part in parts for cell in part.missing]:
        listed = Table("state", "cell", "key", box=None, pad_edge=False)
        for cell in left:
            listed.add_row(cell.state, escape(labels.describe(cell.config)), cell.key)
        console.out().print(listed)
        console.say(f"{len(left)} to run, {expectation(left)}")


def expectation(cells: Sequence[PlannedCell]) -> str:
    """`about 5 min on one device`, and how many cells are of a kind that nothing is known of."""
    records = (record for record in Store(cells[0].config["results"]) if record.status == "done")
    costs = Costs.of(records)
    known = [s for cell in cells if (s := costs.expected(cell.config, tuple(cell.evaluation_keys))) is not None]
    unknown = len(cells) - len(known)
    if not known:
        return "for how long is unknown: none of their kinds has run yet"
    about = f"about {console.duration(sum(known))} on one device"
    return f"{about} and {unknown} of kinds that have not run yet" if unknown else about


def main(arguments: list[str]) -> int:
    """Print the plan; 0 unless the request itself is wrong."""

    def run(table: str | None, overrides: list[str]) -> int:
        parts = parts_of(table, overrides)
        show(parts, table)
        if not any(part.cells for part in parts):
            cli.refuse_nothing(parts)
        return 0

    return cli.command(USAGE, run, arguments)
