"""Tables of rows by sparsity: each number with the row and the column it stands in, the papers' beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from sparsify.errors import UsageError
from sparsify.report.layouts.base import Layout, Row
from sparsify.report.numbers import format_number
from sparsify.report.select import pick, where
from sparsify.runs import registry


@dataclass(frozen=True)
class Entry:
    """One number of ours in a table.

    Attributes:
        pruner: group of rows it belongs to; empty for the dense model.
        label: the row.
        sparsity: the column.
        value: the number, None where its cell has not run.
        note: the hyper-parameter that was selected, if any.
        key: record it came from.
        paper: allocator name in the paper CSV.
    """

    pruner: str
    label: str
    sparsity: float
    value: float | None
    note: str
    key: str
    paper: str


@dataclass(frozen=True, kw_only=True)
class Entries(Layout):
    """Rows by sparsity, in groups by pruner.

    Attributes:
        pruners: groups of rows, in order; others that have run follow.
        rows: the dense model and the allocations.
        paper: CSV of the papers' numbers.
    """

    pruners: list[str]
    rows: list[Row]
    paper: str

    def entries(self, cells: pd.DataFrame) -> list[Entry]:
        """Every number of the table, in reading order.

        Raises:
            UsageError: the cells mix protocols, whose numbers must not share a column.
        """
        _one_protocol(cells, self.value)
        sparsities = sorted(s for s in cells["sparsity"].unique() if s)
        entries = [entry_of(self.value, cells, row, "", 0.0) for row in self.rows if row.dense]
        for pruner in self._pruners(cells):
            for row in (row for row in self.rows if not row.dense):
                entries += [entry_of(self.value, cells, row, pruner, sparsity) for sparsity in sparsities]
        return entries

    def _pruners(self, cells: pd.DataFrame) -> list[str]:
        present = set(cells.loc[cells["sparsity"] > 0, "pruner"])
        listed = [p for p in self.pruners if p in present]
        return listed + [p for p in registry.names("pruner") if p in present and p not in listed]


def _one_protocol(cells: pd.DataFrame, value: str) -> None:
    tags = sorted(cells[f"{value}.protocol"].dropna().unique())
    if len(tags) > 1:
        raise UsageError("Numbers of different protocols cannot share a table", got=", ".join(tags))


def entry_of(value: str, cells: pd.DataFrame, row: Row, pruner: str, sparsity: float) -> Entry:
    """The entry of a row at a sparsity: the one cell that meets its conditions, or the lowest in `minimise`."""
    conditions = {**row.where, "sparsity": sparsity} | ({"pruner": pruner} if pruner else {})
    cell = pick(where(cells, conditions), row.minimise)
    if cell is None:
        return Entry(pruner, row.label, sparsity, None, "", "", row.paper)
    note = f"{row.show.rpartition('.')[2]} {cell[row.show]:.3f}" if row.show else ""
    return Entry(pruner, row.label, sparsity, float(cell[value]), note, cell["key"], row.paper)


def grid_frame(entries: Sequence[Entry], paper: pd.DataFrame, paper_models: Sequence[str]) -> pd.DataFrame:
    """The table as text: rows (pruner, method), columns ours by sparsity, then the papers' by model and sparsity.

    An entry that has not run is an en dash; a number that the papers do not give (or we could not find) is blank.
    """
    sparsities = sorted({e.sparsity for e in entries if e.sparsity}) or [0.0]
    rows: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for entry in entries:
        cells = rows.setdefault((entry.pruner, entry.label), {})
        column = f"{entry.sparsity:.0%}" if entry.sparsity else f"{sparsities[0]:.0%}"
        cells["ours", column] = text_of(entry)
        for model in paper_models:
            number = _paper_value(paper, model, entry)
            if number is not None:
                cells[model, column] = format_number(number)
    columns = [("ours", f"{s:.0%}") for s in sparsities]
    columns += [
        (m, f"{s:.0%}") for m in paper_models for s in sparsities if any((m, f"{s:.0%}") in r for r in rows.values())
    ]
    frame = pd.DataFrame(
        [[cells.get(column, "") for column in columns] for cells in rows.values()],
        index=pd.MultiIndex.from_tuples(rows, names=["pruner", "allocation"]),
        columns=pd.MultiIndex.from_tuples(columns),
    )
    return frame


def _paper_value(paper: pd.DataFrame, model: str, entry: Entry) -> float | None:
    if not entry.paper:
        return None
    conditions = {"model": model, "pruner": entry.pruner, "allocator": entry.paper, "sparsity": entry.sparsity}
    rows = where(paper, conditions)
    return None if rows.empty else float(rows.iloc[0]["value"])


def text_of(entry: Entry) -> str:
    """An entry as it is printed, with the hyper-parameter that was selected."""
    if entry.value is None:
        return "–"
    number = format_number(entry.value)
    return f"{number} ({entry.note})" if entry.note else number
