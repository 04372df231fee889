"""Mean accuracy over question sets: the table of means, what one row gains over the others, and every task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from sparsify.errors import SparsifyError
from sparsify.report.layouts.base import Page
from sparsify.report.layouts.entries import Entries, Entry
from sparsify.report.numbers import paper_numbers
from sparsify.report.select import where


@dataclass(frozen=True, kw_only=True)
class Accuracies(Entries):
    """Mean accuracy over tasks by row and sparsity, then every task.

    Attributes:
        tasks: evaluations that the mean, called `value`, is over.
        gain: label of the row whose lead over each other row is shown.
    """

    tasks: list[str]
    gain: str

    def prepare(self, cells: pd.DataFrame) -> pd.DataFrame:
        """Adds the mean over the tasks."""
        return with_mean(cells, self.tasks, self.value)

    def write(self, page: Page) -> list[Path]:
        """One file of two tables."""
        entries = self.entries(page.cells)
        by_task = f"{page.title}, by task", task_frame(self, entries, page.cells)
        return page.write(mean_frame(self, entries, page.cells), [by_task])


def with_mean(cells: pd.DataFrame, tasks: Sequence[str], name: str) -> pd.DataFrame:
    """The cells that have every task, with the mean under this name, its standard error and its protocol.

    Tasks are independent, so the standard error of their mean is sqrt(sum of squares) / number of tasks.

    Raises:
        SparsifyError: no cell has them all.
    """
    whole = cells[cells.reindex(columns=list(tasks)).notna().all(axis=1)]
    if whole.empty:
        raise SparsifyError("No cell has every task of this table", allowed=", ".join(tasks), fix="eval=zeroshot")
    means = whole.copy()
    errors = whole.reindex(columns=[f"{task}.stderr" for task in tasks])
    tags = whole.reindex(columns=[f"{task}.protocol" for task in tasks])
    means[name] = whole.reindex(columns=list(tasks)).mean(axis=1)
    means[f"{name}.stderr"] = (errors**2).sum(axis=1, skipna=False) ** 0.5 / len(tasks)
    means[f"{name}.protocol"] = [_protocol(row) for row in tags.to_numpy().tolist()]
    return means


def _protocol(tags: list[str]) -> str:
    """`mean of 7 tasks@0-shot`, where all tags agree on what follows the task."""
    kinds = {tag.partition("@")[2] for tag in tags}
    return f"mean of {len(tags)} tasks@{kinds.pop()}" if len(kinds) == 1 else "mean of " + " and ".join(tags)


def mean_frame(layout: Accuracies, entries: list[Entry], cells: pd.DataFrame) -> pd.DataFrame:
    """The means in percent by row and sparsity, then what the row `layout.gain` has more: ours, and in the papers."""
    paper = paper_numbers(layout.paper)
    sparsities = sorted({entry.sparsity for entry in entries if entry.sparsity}) or [0.0]
    errors = dict(zip(cells["key"], cells[f"{layout.value}.stderr"], strict=True))
    best = {(entry.pruner, entry.sparsity): entry.value for entry in entries if entry.label == layout.gain}
    published = list(dict.fromkeys(zip(paper["model"], paper["sparsity"], strict=True)))
    rows: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for entry in entries:
        texts = rows.setdefault((entry.pruner, entry.label), {})
        texts["ours", f"{entry.sparsity or sparsities[0]:.0%}"] = _percent(entry.value, errors.get(entry.key))
        texts[_gain(layout, "ours"), f"{entry.sparsity:.0%}"] = _points(entry, best.get((entry.pruner, entry.sparsity)))
        for model, sparsity in published:
            conditions = {"model": model, "sparsity": sparsity, "pruner": entry.pruner, "allocator": entry.paper}
            theirs = where(paper, conditions)
            texts[_gain(layout, model), f"{sparsity:.0%}"] = "" if theirs.empty else f"{theirs.iloc[0]['value']:+.2f}"
    columns = [(group, f"{s:.0%}") for group in ("ours", _gain(layout, "ours")) for s in sparsities]
    return _frame(rows, columns + [(_gain(layout, model), f"{s:.0%}") for model, s in published])


def _gain(layout: Accuracies, whose: str) -> str:
    return f"{layout.gain} − row, {whose}"


def _percent(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.2f}" + (f" ± {100 * error:.2f}" if error is not None and math.isfinite(error) else "")


def _points(entry: Entry, best: float | None) -> str:
    if not entry.pruner or entry.value is None or best is None or entry.value == best:
        return ""
    return f"{100 * (best - entry.value):+.2f}"


def task_frame(layout: Accuracies, entries: list[Entry], cells: pd.DataFrame) -> pd.DataFrame:
    """Every task in percent: `acc`, and `acc_norm` where the harness has it."""
    measured = [(task, metric) for metric in ("acc", "acc_norm") for task in layout.tasks]
    names = {(task, metric): task if metric == "acc" else f"{task}.{metric}" for task, metric in measured}
    columns = [column for column in measured if names[column] in cells]
    several = len({entry.sparsity for entry in entries if entry.sparsity}) > 1
    rows = {}
    for entry in entries:
        cell = cells[cells["key"] == entry.key]
        label = f"{entry.label} {entry.sparsity:.0%}" if several and entry.sparsity else entry.label
        rows[entry.pruner, label] = {} if cell.empty else {c: _percent(cell.iloc[0][names[c]], None) for c in columns}
    return _frame(rows, columns)


def _frame(rows: dict[tuple[str, str], dict[tuple[str, str], str]], columns: list[tuple[str, str]]) -> pd.DataFrame:
    return pd.DataFrame(
        [[texts.get(column, "") for column in columns] for texts in rows.values()],
        index=pd.MultiIndex.from_tuples(rows, names=["pruner", "allocation"]),
        columns=pd.MultiIndex.from_tuples(columns),
    )
