"""Curves by block: a figure with a line per allocation, and a table of their values at a few depths."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes

from sparsify.errors import UsageError
from sparsify.report import figures
from sparsify.report.layouts.base import Layout, Page
from sparsify.report.numbers import format_number
from sparsify.report.select import pick, where

DEPTHS = {"1/4": 0.25, "1/2": 0.5, "3/4": 0.75, "last": 1.0}
"""Depths at which the table reads a curve."""
BASELINES = [figures.COLOURS[i] for i in (6, 2, 3, 4)]
"""Neither red nor blue, which are for the rows that range over a number."""


@dataclass(frozen=True)
class CurveRow:
    """A line, or several.

    Attributes:
        label: as printed; `{:g}` stands for the value of `each`.
        where: columns of the wide rows and what they must be.
        each: a column of numbers: one line for each of its values.
    """

    label: str
    where: dict[str, Any]
    each: str | None = None


@dataclass(frozen=True)
class AtLast:
    """A further curve of which the table shows the value at the last block."""

    label: str
    curve: str


@dataclass(frozen=True)
class Panel:
    """A panel of the figure.

    Attributes:
        label: its title.
        curve: the measurement that is drawn.
        over: a measurement it is divided by, at the block before.
        dense: curves of the dense model to draw instead, by label.
        level: height of a dotted line.
        log: whether the axis is logarithmic.
    """

    label: str
    curve: str = ""
    over: str = ""
    dense: dict[str, str] = field(default_factory=dict)
    level: float | None = None
    log: bool = False

    def __post_init__(self) -> None:
        if bool(self.curve) == bool(self.dense):
            raise UsageError(f"The panel {self.label!r} needs one of `curve` and `dense`", got=self.curve or "neither")


@dataclass(frozen=True, kw_only=True)
class Curves(Layout):
    """Curves over depth: a figure of panels, and a table of the main one at a few depths.

    Attributes:
        curve: the evaluation whose curve is tabulated.
        curve_label: heading of its columns.
        rows: lines.
        at_last: further columns.
        panels: of the figure.
    """

    curve: str
    curve_label: str
    rows: list[CurveRow]
    at_last: list[AtLast] = field(default_factory=list)
    panels: list[Panel]

    def write(self, page: Page) -> list[Path]:
        """A table and a figure."""
        drawn = lines(self, page.cells)
        files = page.write(summary(self, drawn))
        return files + figure(page.figures, f"{page.name}_{page.stem}", self, drawn, page.title)


@dataclass(frozen=True)
class Line:
    """One allocation: its cell and how it is drawn."""

    label: str
    cell: pd.Series
    colour: Any
    style: str

    def values(self, name: str, kind: str = "curve") -> list[float]:
        """A measurement's curve (or `curve_stderr`), first to last block; empty where there is none."""
        text = self.cell.get(f"{name}.{kind}")
        return [float(x) for x in text.split("|")] if isinstance(text, str) else []


def lines(layout: Curves, cells: pd.DataFrame) -> list[Line]:
    """The layout's rows that have been measured; a row with `each` is one line per value of that column.

    Raises:
        UsageError: none has.
    """
    column = f"{layout.curve}.curve"
    measured = cells[cells[column].notna()] if column in cells else cells.iloc[:0]
    drawn: list[Line] = []
    for colour, row in zip(cycle(BASELINES), layout.rows, strict=False):
        chosen = where(measured, row.where)
        if row.each is None:
            cell = pick(chosen, None)
            drawn += [] if cell is None else [Line(row.label, cell, colour, "--")]
        else:
            drawn += _one_each(row, chosen)
    if not drawn:
        raise UsageError(
            "No cell of this table has its curves yet",
            got=f"{len(cells)} cells without {layout.curve}",
            fix=f"eval={layout.curve}",
        )
    return drawn


def _one_each(row: CurveRow, cells: pd.DataFrame) -> list[Line]:
    """Cells by the value of a column: reds below zero, blues above, darker farther out."""
    assert row.each is not None
    values = sorted(float(value) for value in cells[row.each].unique()) if row.each in cells else []
    reach = max((abs(value) for value in values), default=1.0)
    made = []
    for value in values:
        shade = 0.35 + 0.6 * abs(value) / reach
        cell = pick(where(cells, {row.each: value}), None)
        assert cell is not None
        made.append(Line(row.label.format(value), cell, mpl.colormaps["Reds" if value < 0 else "Blues"](shade), "-"))
    return made


def summary(layout: Curves, drawn: list[Line]) -> pd.DataFrame:
    """One row per allocation: the table's value, the main curve at a quarter, half, ... of the depth, and `last`."""
    rows, index = [], []
    for line in drawn:
        curve = line.values(layout.curve)
        ends = [line.values(item.curve)[-1] for item in layout.at_last]
        rows.append(
            [format_number(float(line.cell[layout.value]))]
            + [f"{curve[math.ceil(depth * len(curve)) - 1]:.3f}" for depth in DEPTHS.values()]
            + [f"{end:.3f}" for end in ends]
        )
        index.append((str(line.cell["pruner"]), line.label))
    columns = [("perplexity", "")] + [(layout.curve_label, depth) for depth in DEPTHS]
    columns += [(item.label, "last") for item in layout.at_last]
    names = ["pruner", "allocation"]
    return pd.DataFrame(
        rows, index=pd.MultiIndex.from_tuples(index, names=names), columns=pd.MultiIndex.from_tuples(columns)
    )


def figure(folder: Path, name: str, layout: Curves, drawn: list[Line], title: str) -> list[Path]:
    """The layout's panels, three in a row; bands are one standard error between the windows of the text."""
    rows = -(-len(layout.panels) // 3)
    width = 1.5 + 2.1 * min(len(layout.panels), 3)
    with figures.saved(folder, name, width, 0.4 + 1.85 * rows, len(layout.panels), False, rows) as (panels, files):
        for axes, panel in zip(panels, layout.panels, strict=False):
            _panel(axes, panel, drawn)
        for axes in panels[-3:]:
            axes.set_xlabel("block")
        for axes in panels[len(layout.panels) :]:
            axes.set_visible(False)
        handles, labels = panels[0].get_legend_handles_labels()
        panels[0].figure.legend(handles, labels, loc="outside right center")
        panels[0].figure.suptitle(title, fontsize=8)
    return files


def _panel(axes: Axes, panel: Panel, drawn: list[Line]) -> None:
    if panel.dense:
        _dense_curves(axes, panel, drawn[0])
    else:
        for line in drawn:
            curve = _over(line, panel) if panel.over else line.values(panel.curve)
            axes.plot(range(1, len(curve) + 1), curve, line.style, color=line.colour, label=line.label)
            _band(axes, line, panel)
    if panel.level is not None:
        axes.axhline(panel.level, color="0.5", linewidth=0.8, linestyle=":")
    if panel.log:
        figures.log_axis(axes, "y")
    axes.set_title(panel.label)


def _over(line: Line, panel: Panel) -> list[float]:
    """A curve over another one at the block before; the first block has none before it."""
    before = line.values(panel.over)
    pairs = zip(line.values(panel.curve)[1:], before, strict=False)
    return [math.nan, *(this / that if that else math.nan for this, that in pairs)]


def _band(axes: Axes, line: Line, panel: Panel) -> None:
    errors = line.values(panel.curve, "curve_stderr")
    if errors and not panel.over:
        curve = line.values(panel.curve)
        low, high = ([c + sign * e for c, e in zip(curve, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(range(1, len(curve) + 1), low, high, color=line.colour, alpha=0.15, linewidth=0)


def _dense_curves(axes: Axes, panel: Panel, line: Line) -> None:
    """Curves of the dense model, the same whatever was pruned."""
    for style, (label, curve) in zip(("-", "-."), panel.dense.items(), strict=False):
        values = line.values(curve)
        axes.plot(range(1, len(values) + 1), values, style, color="0.3", label=label)
    axes.legend(loc="best")
