"""Tables of rows by pruner and columns by sparsity, several runs in an entry: what medians and training share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pandas as pd

from sparsify.report.layouts.base import Layout, Row
from sparsify.report.select import where

Show = Callable[[Sequence[float]], str]
"""Makes one entry of the values of several runs."""


@dataclass(frozen=True, kw_only=True)
class BySparsity(Layout):
    """Rows by pruner, columns by sparsity.

    Attributes:
        pruners: groups of rows, in order.
        rows: the dense model (quantised, say, by its `where`) and what is held against it; one that names its pruner is
            shown under that one alone, or under another (`Row.under`), whose masks it changes, say.
        tasks: whose mean accuracy makes a table of its own, where it was measured.
    """

    second = "allocation"  # heading of the rows' labels

    pruners: list[str]
    rows: list[Row]
    tasks: list[str] = field(default_factory=list)

    def present(self, cells: pd.DataFrame) -> list[str]:
        """Pruners that have run."""
        have = set(cells.loc[cells["sparsity"] > 0, "pruner"])
        return [pruner for pruner in self.pruners if pruner in have]

    def entries(self, cells: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
        """(pruner, label, its cells) of every row that has any."""
        rows, pruned = [row for row in self.rows if not row.dense], cells[cells["sparsity"] > 0]
        found = [
            (pruner, str(row.label), where(pruned, {"pruner": pruner, **row.where}))
            for pruner in self.present(cells)
            for row in rows
            if (row.under or row.where.get("pruner", pruner)) == pruner
        ]
        return [entry for entry in found if not entry[2].empty]

    def frame(self, cells: pd.DataFrame, value: str, show: Show) -> pd.DataFrame:
        """A dash for what was not measured, no row where nothing was."""
        sparsities = sorted(s for s in set(cells["sparsity"]) if s > 0)
        rows: dict[tuple[str, str], list[str]] = {}
        for row in (row for row in self.rows if row.dense):
            dense = _shown(where(cells, {"sparsity": 0.0, **row.where}), value, show)
            rows["", str(row.label)] = [dense] + [""] * (len(sparsities) - 1)
        for pruner, label, chosen in self.entries(cells):
            rows[pruner, label] = [_shown(where(chosen, {"sparsity": s}), value, show) for s in sparsities]
        rows = {row: numbers for row, numbers in rows.items() if set(numbers) - {"–", ""}}
        columns = pd.MultiIndex.from_tuples([("zeros", f"{100 * s:g}%") for s in sparsities])
        index = pd.MultiIndex.from_tuples(rows, names=["pruner", self.second])
        return pd.DataFrame(list(rows.values()), index=index, columns=columns)

    def accuracy(self, cells: pd.DataFrame, show: Show) -> list[tuple[str, pd.DataFrame]]:
        """The table of mean accuracies with its title, where any were measured."""
        title, mean = with_accuracy(cells, self.tasks)
        return [(title, self.frame(mean, "accuracy", show))] if title else []


def with_accuracy(cells: pd.DataFrame, tasks: Sequence[str]) -> tuple[str, pd.DataFrame]:
    """The cells with their mean `accuracy` in percent, and the heading of its table; empty where none was measured."""
    measured = [task for task in tasks if task in cells]
    if not measured:
        return "", cells
    mean = 100 * cells[measured].mean(axis=1, skipna=False)
    return f"Mean accuracy over {', '.join(measured)}, in percent", cells.assign(accuracy=mean)


def values_of(cells: pd.DataFrame, value: str) -> list[float]:
    """What was measured, of all runs."""
    return list(cells[value].dropna()) if value in cells else []


def _shown(cells: pd.DataFrame, value: str, show: Show) -> str:
    found = values_of(cells, value)
    return show(found) if found else "–"
