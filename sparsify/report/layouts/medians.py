"""Medians over seeds, where perplexities are too wild for means: perplexity, its logarithm, accuracy, searches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from sparsify.report import frame
from sparsify.report.layouts import search
from sparsify.report.layouts.base import Layout, Page, Row
from sparsify.report.layouts.entries import Entry
from sparsify.report.layouts.perplexity_figures import layer_profile
from sparsify.report.numbers import format_number
from sparsify.report.select import where


@dataclass(frozen=True, kw_only=True)
class Medians(Layout):
    """Median and range over seeds by row and sparsity.

    Attributes:
        pruners: groups of rows, in order.
        rows: the dense model and the allocations.
        tasks: whose mean accuracy makes a table of its own, where it was measured.
    """

    pruners: list[str]
    rows: list[Row]
    tasks: list[str] = field(default_factory=list)

    def write(self, page: Page) -> list[Path]:
        """A file of up to three tables, the search curves and the sparsity of every block."""
        cells, logs = page.cells, "Log-perplexity (nats per token)"
        more = [
            (
                logs,
                _frame(self, cells, self.value, lambda values: _median([math.log(x) for x in values], "{:.3f}".format)),
            )
        ]
        if accuracies := [task for task in self.tasks if task in cells]:
            mean = cells.assign(accuracy=100 * cells[accuracies].mean(axis=1, skipna=False))
            title = f"Mean accuracy over {', '.join(accuracies)}, in percent"
            more.append((title, _frame(self, mean, "accuracy", lambda values: _median(values, "{:.1f}".format))))
        files = page.write(_frame(self, cells, self.value, lambda values: _median(values, format_number)), more)
        return files + self._figures(page)

    def _figures(self, page: Page) -> list[Path]:
        """Of the first pruner and the first seed."""
        cells = where(page.cells, {"seed": page.cells["seed"].min()})
        cells = cells[cells["pruner"].eq(self._pruners(cells)[0]) & (cells["sparsity"] > 0)]
        runs = search.runs_of(self, cells)
        files = layer_profile(page.figures, f"levels_{page.stem}", _entries(runs, self.value), frame.profiles(cells))
        if any(len(run.heldout) for run in runs):
            protocol = str(page.cells["heldout.protocol"].dropna().iloc[0])
            files += search.figure(page.figures, f"search_curves_{page.stem}", self, runs, protocol)
        return files

    def _pruners(self, cells: pd.DataFrame) -> list[str]:
        present = set(cells.loc[cells["sparsity"] > 0, "pruner"])
        return [pruner for pruner in self.pruners if pruner in present]


def _entries(runs: Sequence[search.Run], value: str) -> list[Entry]:
    return [Entry(r.cell["pruner"], r.label, r.sparsity, float(r.cell[value]), "", r.cell["key"], "") for r in runs]


def _frame(layout: Medians, cells: pd.DataFrame, value: str, show: Callable[[Sequence[float]], str]) -> pd.DataFrame:
    """Rows (pruner, allocation), columns by sparsity; a dash for what was not measured, no row where nothing was."""
    sparsities = sorted(s for s in set(cells["sparsity"]) if s > 0)
    rows: dict[tuple[str, str], list[str]] = {}
    for row in (row for row in layout.rows if row.dense):
        rows["", row.label] = [_shown(where(cells, {"sparsity": 0.0}), value, show)] + [""] * (len(sparsities) - 1)
    for pruner in layout._pruners(cells):
        for row in (row for row in layout.rows if not row.dense and row.where.get("pruner", pruner) == pruner):
            chosen = where(cells, {**row.where, "pruner": pruner})
            if not chosen.empty:
                rows[pruner, row.label] = [_shown(where(chosen, {"sparsity": s}), value, show) for s in sparsities]
    rows = {row: numbers for row, numbers in rows.items() if set(numbers) - {"–", ""}}
    columns = pd.MultiIndex.from_tuples([("zeros", f"{100 * s:g}%") for s in sparsities])
    index = pd.MultiIndex.from_tuples(rows, names=["pruner", "allocation"])
    return pd.DataFrame(list(rows.values()), index=index, columns=columns)


def _shown(cells: pd.DataFrame, value: str, show: Callable[[Sequence[float]], str]) -> str:
    found = list(cells[value].dropna()) if value in cells else []
    return show(found) if found else "–"


def _median(values: Sequence[float], number: Callable[[float], str]) -> str:
    """`180 [170 to 210] (3)`; a single run is its number."""
    middle = number(float(np.median(values)))
    if len(values) < 2:
        return middle
    return f"{middle} [{number(min(values))} to {number(max(values))}] ({len(values)})"
