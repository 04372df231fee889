"""`python -m sparsify.report table=table1`: Markdown, CSV, LaTeX and figures from the records. Runs no model.

With `rows=results/published/<folder>/<table>.csv` the same files are made from published rows, beside them; the
lines of a `notes.txt` there are added to the footnotes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from sparsify.commands import cli
from sparsify.errors import SparsifyError, UsageError
from sparsify.report import frame, layouts
from sparsify.report.layouts.base import Layout, Page
from sparsify.runs import console, registry
from sparsify.runs.planning import parts_of
from sparsify.runs.records import Store


@dataclass(frozen=True)
class Source:
    """What a report is made from.

    Attributes:
        rows: long rows of the finished cells.
        planned: cells the table has in all; None where that is not known.
        tables: folder for tables.
        figures: folder for figures.
        notes: remarks of whoever published the rows.
    """

    rows: pd.DataFrame
    planned: int | None
    tables: Path
    figures: Path
    notes: tuple[str, ...] = ()


def report(name: str, overrides: list[str], rows: Path | None = None) -> list[Path]:
    """Write a table and its figures from whatever has finished; returns the files.

    Args:
        name: a file of `configs/table`.
        overrides: the Hydra overrides that the sweep was run with (model, scale, ...).
        rows: published long rows to use instead of records.

    Raises:
        UsageError: the table's file is not as its layout has it.
        SparsifyError: no cell of this table has finished.
    """
    layout = layouts.load(name)
    source = _from_records(name, overrides) if rows is None else _from_rows(rows)
    cells = layout.prepare(frame.wide(source.rows))
    model, scale = str(cells["model"].iloc[0]), str(cells["scale"].iloc[0])
    stem = f"{model.replace('/', '-')}_{scale}"
    title = f"{layout.title} — {model}, {scale} scale"
    notes = [*layout.notes, *_footer(cells, source, layout), *source.notes]
    return layout.write(Page(cells, source.rows, name, stem, title, notes, source.tables, source.figures))


def _from_records(name: str, overrides: list[str]) -> Source:
    cells = [cell for part in parts_of(name, overrides) for cell in part.cells if cell.state != "illegal"]
    results = Path(cells[0].config["results"])
    store = Store(results)
    records = [store.read(cell.key) for cell in cells if cell.state == "done"]
    if not records:
        raise SparsifyError(f"No cell of {name} has finished yet", got=f"0 of {len(cells)} cells", fix=f"make {name}")
    rows = frame.long(record for record in records if record is not None)
    return Source(
        rows.drop_duplicates(["key", "evaluation"]),
        len({cell.key for cell in cells}),
        results / "tables",
        results / "figures",
    )


def _from_rows(file: Path) -> Source:
    remarks = file.with_name("notes.txt")
    notes = remarks.read_text(encoding="utf8").splitlines() if remarks.is_file() else []
    return Source(frame.read_long(file), None, file.parent, file.parent, tuple(notes))


def _footer(cells: pd.DataFrame, source: Source, layout: Layout) -> list[str]:
    """What a reader must know about these numbers, from the rows themselves."""

    def all_of(column: str) -> str:
        return ", ".join(sorted(set(cells[column].dropna().astype(str))))

    all_cells = len(cells) if source.planned is None else source.planned
    some = "" if source.planned is None else f"{len(cells)} of "
    commits = ", ".join(sorted({_short(c) for c in cells["commit"].dropna()}))
    return [
        f"Protocol {all_of(f'{layout.value}.protocol')}; {all_of('dtype')}; calibration: {all_of('calibration')}.",
        f"{some}{console.counted(all_cells, 'cell')} finished; {all_of('device')}; commit {commits}.",
    ]


def _short(commit: str) -> str:
    """Twelve digits, and whether the checkout had changes."""
    digits, dash, dirty = commit.partition("-")
    return digits[:12] + dash + dirty


USAGE = """python -m sparsify.report table=NAME [overrides] [rows=FILE]

Markdown, CSV, LaTeX and figures of a table, from the records that have finished; runs no model.
  python -m sparsify.report table=table1
  python -m sparsify.report table=table1 scale=paper model=llama2-7b
  python -m sparsify.report table=table1 rows=results/published/<folder>/table1/<file>.csv     from published rows
Overrides are those that the sweep was run with."""


def main(arguments: list[str]) -> int:
    """Print the table and the paths of the files."""

    def run(name: str | None, overrides: list[str]) -> int:
        if name is None:
            raise UsageError("Which table?", allowed=", ".join(registry.names("table")), fix="table=table1")
        rows = [Path(a.removeprefix("rows=")) for a in overrides if a.startswith("rows=")]
        files = report(name, [a for a in overrides if not a.startswith("rows=")], rows[-1] if rows else None)
        console.out().print(files[0].read_text(encoding="utf8"), markup=False)
        for file in files:
            console.say(f"wrote {file}")
        return 0

    return cli.command(USAGE, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
