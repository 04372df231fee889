"""What foretells the damage of pruning one unit alone: rank correlations, scatter plots, and curves over depth."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from sparsify.errors import UsageError
from sparsify.report.correlation import RankCorrelation
from sparsify.report.layouts import sensitivity_figures
from sparsify.report.layouts.base import Layout, Page
from sparsify.report.select import pick


@dataclass(frozen=True)
class DamageRow:
    """A way of pruning one unit alone.

    Attributes:
        label: as printed.
        damage: the evaluation that measured it.
        at: percent of zeros, which stands in for `{at}` in the names of predictors.
        drawn: whether it is a row of the scatter plots.
    """

    label: str
    damage: str
    at: int
    drawn: bool = False


@dataclass(frozen=True)
class Predictor:
    """Something that may foretell damage.

    Attributes:
        label: as printed.
        of: the measurement, `{at}` for the row's percent of zeros; none for the depth of the unit, from 1.
        drawn: whether it has a panel in the figures.
    """

    label: str
    of: str = ""
    drawn: bool = False


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Layout):
    """Rank correlations of predictors with the damage of pruning one block, or one matrix, alone.

    Attributes:
        rows: ways of pruning.
        predictors: columns.
    """

    rows: list[DamageRow]
    predictors: list[Predictor] = field(default_factory=list)

    def write(self, page: Page) -> list[Path]:
        """A table, one within the kinds of matrices, and two figures."""
        measured = damages(self, page.cells)
        files = page.write(summary(measured, self.predictors), within_kinds(measured, self.predictors))
        drawn = [predictor for predictor in self.predictors if predictor.drawn]
        files += sensitivity_figures.scatter(page.figures, f"scatter_{page.stem}", measured, drawn, page.title)
        return files + sensitivity_figures.depth(page.figures, f"depth_{page.stem}", measured, drawn, page.title)


@dataclass(frozen=True)
class Damage:
    """A row of the layout and the cell that has its measurements.

    Attributes:
        row: the layout's.
        cell: the dense cell.
        kinds: kinds of matrices, where units are matrices; else empty.
    """

    row: DamageRow
    cell: pd.Series
    kinds: tuple[str, ...]

    def values(self, kind: str = "", of: str = "curve") -> list[float]:
        """Damage by block, or of the matrices of a kind; its standard errors for `curve_stderr`."""
        return _curve(self.cell, f"{self.row.damage}.{kind}" if kind else self.row.damage, of)

    def predicted(self, predictor: Predictor, kind: str = "") -> list[float]:
        """A predictor of the same units; empty where it has not been measured."""
        if not predictor.of:
            return [float(block) for block in range(1, len(self.values(kind)) + 1)]
        name = predictor.of.format(at=self.row.at)
        return _curve(self.cell, f"{name}.{kind}" if kind else name)

    def pooled(self, predictor: Predictor) -> tuple[list[float], list[float]]:
        """A predictor and the damage of all units; both empty where it has not been measured for each."""
        parts = [(self.predicted(predictor, kind), self.values(kind)) for kind in self.kinds or ("",)]
        if not all(x for x, _ in parts):
            return [], []
        return [value for x, _ in parts for value in x], [value for _, y in parts for value in y]


def damages(layout: Sensitivity, cells: pd.DataFrame) -> list[Damage]:
    """The layout's rows that have been measured.

    Raises:
        UsageError: none has.
    """
    cell = pick(cells, None)
    found = [] if cell is None else [Damage(row, cell, _kinds(cell, row.damage)) for row in layout.rows]
    measured = [damage for damage in found if damage.kinds or damage.values()]
    if not measured:
        raise UsageError("No damage of this table has been measured", fix="eval=sensitivity")
    return measured


def summary(measured: Sequence[Damage], predictors: Sequence[Predictor]) -> pd.DataFrame:
    """A row per way of pruning: units, and the rank correlation of each predictor with their damage."""
    rows = []
    for damage in measured:
        units = sum(len(damage.values(kind)) for kind in damage.kinds or ("",))
        rows.append([str(units), *(_correlation(*damage.pooled(predictor)) for predictor in predictors)])
    labels = [("", damage.row.label) for damage in measured]
    return _table(labels, rows, ["units", *(predictor.label for predictor in predictors)], "one unit pruned")


def within_kinds(measured: Sequence[Damage], predictors: Sequence[Predictor]) -> list[tuple[str, pd.DataFrame]]:
    """The same among the matrices of one kind, a table for each way of pruning matrices."""
    tables = []
    for damage in measured:
        rows = []
        for kind in damage.kinds:
            values = damage.values(kind)
            rows.append([str(len(values)), *(_correlation(damage.predicted(p, kind), values) for p in predictors)])
        if rows:
            labels = [("", kind) for kind in damage.kinds]
            frame = _table(labels, rows, ["units", *(p.label for p in predictors)], "matrix")
            tables.append((f"{damage.row.label}, within a kind", frame))
    return tables


def _correlation(x: list[float], y: list[float]) -> str:
    return str(RankCorrelation.of(x, y)) if len(x) > 1 else ""


def _table(labels: list[tuple[str, str]], rows: list[list[str]], columns: list[str], what: str) -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples(labels, names=["", what])
    return pd.DataFrame(rows, index=index, columns=pd.MultiIndex.from_tuples([(column, "") for column in columns]))


def _kinds(cell: pd.Series, evaluation: str) -> tuple[str, ...]:
    """Kinds of matrices that an evaluation has curves of, in the order of the block."""
    pattern = re.compile(rf"{re.escape(evaluation)}\.(.+)\.curve")
    found = [pattern.fullmatch(str(name)) for name in cell.index if isinstance(cell[name], str)]
    return tuple(match.group(1) for match in found if match)


def _curve(cell: pd.Series, name: str, of: str = "curve") -> list[float]:
    text = cell.get(f"{name}.{of}")
    return [float(x) for x in text.split("|")] if isinstance(text, str) else []
