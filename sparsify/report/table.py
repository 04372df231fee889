"""A table's layout applied to records: entries by row and sparsity, the paper's numbers beside ours."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from omegaconf import DictConfig

from sparsify import paths
from sparsify.errors import UsageError
from sparsify.report.select import pick, where


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


def entries(layout: DictConfig, cells: pd.DataFrame, pruners: list[str], sparsities: list[float]) -> list[Entry]:
    """Every entry of the table, in reading order.

    Args:
        layout: a file of `configs/table`.
        cells: wide frame of the finished cells of this table.
        pruners: groups of rows, in order.
        sparsities: columns, in order; the dense row repeats in none of them.

    Raises:
        UsageError: the cells mix protocols, whose numbers must not share a column.
    """
    if not cells.empty:
        _one_protocol(cells, layout.value)
    found = [_entry(layout, cells, row, "", 0.0) for row in layout.rows if row.get("dense")]
    for pruner in pruners:
        for row in layout.rows:
            if not row.get("dense"):
                found += [_entry(layout, cells, row, pruner, sparsity) for sparsity in sparsities]
    return found


def _one_protocol(cells: pd.DataFrame, value: str) -> str:
    tags = sorted(cells[f"{value}.protocol"].dropna().unique())
    if len(tags) > 1:
        raise UsageError("Numbers of different protocols cannot share a table", got=", ".join(tags))
    return str(tags[0]) if tags else ""


def _entry(layout: DictConfig, cells: pd.DataFrame, row: DictConfig, pruner: str, sparsity: float) -> Entry:
    conditions = {str(key): value for key, value in row.get("where", {}).items()}
    conditions["sparsity"] = sparsity
    if pruner:
        conditions["pruner"] = pruner
    cell = pick(where(cells, conditions), row.get("minimise"))
    note = ""
    if cell is not None and row.get("show"):
        note = f"{row.show.rpartition('.')[2]} {cell[row.show]:.3f}"
    value = None if cell is None else float(cell[layout.value])
    return Entry(pruner, row.label, sparsity, value, note, "" if cell is None else cell["key"], row.get("paper", ""))


def paper_numbers(layout: DictConfig) -> pd.DataFrame:
    """The papers' numbers of this table, each with its source.

    Columns: model, pruner, allocator, sparsity, protocol, value, source.
    """
    frame = pd.read_csv(paths.root() / layout.paper)
    return frame.fillna({"pruner": ""})


def grid_frame(found: list[Entry], paper: pd.DataFrame, paper_models: list[str]) -> pd.DataFrame:
    """The table as text: rows (pruner, method), columns ours by sparsity, then the papers' by model and sparsity.

    An entry that has not run is an en dash; a number that the papers do not give (or we could not find) is blank.
    """
    sparsities = sorted({e.sparsity for e in found if e.sparsity}) or [0.0]
    rows: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for entry in found:
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


def format_number(value: float) -> str:
    """Two decimals below 100, one below 1000, none below 100,000, scientific above: as the papers print them."""
    if value < 100:
        return f"{value:.2f}"
    if value < 1000:
        return f"{value:.1f}"
    return f"{value:.0f}" if value < 1e5 else f"{value:.1e}"
