"""What later blocks make of a disturbance: a table by third of the depth, the drifts, and r by block and scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sparsify.errors import UsageError
from sparsify.report import figures
from sparsify.report.layouts.base import Layout, Page
from sparsify.report.select import pick

THIRDS = ("first third", "middle", "last third")


@dataclass(frozen=True)
class DisturbanceRow:
    """A disturbance.

    Attributes:
        label: as printed.
        of: the evaluation that measured it.
        eta: size of the noise, for the rows of the sweep over sizes.
    """

    label: str
    of: str
    eta: float | None = None


@dataclass(frozen=True, kw_only=True)
class Absorption(Layout):
    """Coefficients by third of the depth, drifts, and r by block and size of the noise.

    Attributes:
        rows: disturbances.
        drifts: evaluations that are columns of the drift figure.
        compared: evaluations whose coefficients are set side by side.
        pruning: the evaluation whose sizes mark the scale of pruning.
    """

    rows: list[DisturbanceRow]
    drifts: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    pruning: str | None = None

    def write(self, page: Page) -> list[Path]:
        """A table and two figures."""
        measured = disturbances(self, page.cells)
        files = page.write(summary(measured))
        files += drift_figure(page.figures, f"drift_{page.stem}", self, measured, page.title)
        return files + coefficient_figure(page.figures, f"absorption_{page.stem}", self, measured, page.title)


@dataclass(frozen=True)
class Disturbance:
    """One row of the layout and the cell that has its curves.

    Attributes:
        label: as printed.
        of: the evaluation.
        cell: the dense cell.
        eta: size of the noise, for the rows of the sweep over scales.
    """

    label: str
    of: str
    cell: pd.Series
    eta: float | None

    def curve(self, name: str = "", kind: str = "curve") -> list[float]:
        """A measurement by block (`r` where none is named); empty where there is none."""
        text = self.cell.get(f"{self.of}.{name}.{kind}" if name else f"{self.of}.{kind}")
        return [float(x) for x in text.split("|")] if isinstance(text, str) else []

    @property
    def r(self) -> list[float]:
        """Coefficients, first to last block."""
        return self.curve()

    @property
    def size(self) -> float:
        """Relative drift where the disturbance is put in, median block."""
        return float(np.median(self.curve("size")))

    def followed(self) -> list[int]:
        """Disturbed blocks (from 1) whose drift was kept."""
        start, end = f"{self.of}.relative.", ".curve"
        names = [str(column) for column in self.cell.index if isinstance(self.cell[column], str)]
        return sorted(int(n[len(start) : -len(end)]) for n in names if n.startswith(start) and n.endswith(end))


def disturbances(layout: Absorption, cells: pd.DataFrame) -> list[Disturbance]:
    """The layout's rows that have been measured.

    Raises:
        UsageError: none has.
    """
    cell = pick(cells, None)
    rows = [] if cell is None else [Disturbance(row.label, row.of, cell, row.eta) for row in layout.rows]
    measured = [row for row in rows if row.r]
    if not measured:
        raise UsageError("No disturbance of this table has been measured", fix="eval=absorption")
    return measured


def summary(measured: Sequence[Disturbance]) -> pd.DataFrame:
    """A row per disturbance: size, r and the number of absorbing blocks by third, excess, falling steps."""
    rows, index = [], []
    for item in measured:
        r, falls = item.r[:-1], item.curve("falls")[:-1]
        thirds = [list(part) for part in np.array_split(np.array(r), 3)]
        rows.append(
            [f"{item.size:.2g}"]
            + [f"{_geometric(part):.2f}" for part in thirds]
            + [f"{sum(x < 1 for x in part)} of {len(part)}" for part in thirds]
            + [f"{_geometric(excess):.1f}" if (excess := item.curve("excess")[:-1]) else "", f"{np.mean(falls):.0%}"]
        )
        index.append(("", item.label))
    columns = [("size", "")] + [("r", third) for third in THIRDS] + [("blocks with r < 1", third) for third in THIRDS]
    return pd.DataFrame(
        rows,
        index=pd.MultiIndex.from_tuples(index, names=["", "disturbance"]),
        columns=pd.MultiIndex.from_tuples([*columns, ("excess", ""), ("steps that fall", "")]),
    )


def _geometric(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values)))) if len(values) else math.nan


def drift_figure(folder: Path, name: str, layout: Absorption, measured: list[Disturbance], title: str) -> list[Path]:
    """Relative drift (above) and distance 1 - cosine (below) from the disturbed block to the end; a column each.

    Bands: two standard errors over windows. Dotted: the drift if every later block handed the disturbance on and only
    the residual stream grew.
    """
    shown = [item for of in layout.drifts for item in measured if item.of == of]
    columns = len(shown)
    with figures.saved(folder, name, 0.9 + 1.9 * columns, 4.0, 2 * columns, False, rows=2) as (panels, files):
        for column, item in enumerate(shown):
            above, below = panels[column], panels[column + columns]
            blocks = item.followed()
            for block, colour in zip(blocks, mpl.colormaps["viridis"](np.linspace(0, 0.9, len(blocks))), strict=True):
                relative = item.curve(f"relative.{block}")
                depth = range(block, block + len(relative))
                _banded(above, depth, item, f"relative.{block}", colour, label=f"block {block}")
                handed_on = item.curve(f"handed_on.{block}")
                above.plot(depth[: len(handed_on)], handed_on, ":", color=colour, linewidth=0.8)
                _banded(below, depth, item, f"turned.{block}", colour)
            for axes in (above, below):
                axes.set_yscale("log")
            above.set_title(item.label, fontsize=7)
            below.set_xlabel("block")
        panels[0].set_ylabel("relative drift $R_k$")
        panels[columns].set_ylabel("1 − cosine to the clean state")
        panels[0].figure.legend(*panels[0].get_legend_handles_labels(), title="disturbed", loc="outside right center")
        panels[0].figure.suptitle(title, fontsize=8)
    return files


def coefficient_figure(
    folder: Path, name: str, layout: Absorption, measured: list[Disturbance], title: str
) -> list[Path]:
    """Coefficients r for noise of every size, the same as a map with the line r = 1, and r of other disturbances."""
    sweep = [item for item in measured if item.eta is not None]
    with figures.saved(folder, name, 9.6, 2.7, 3, sharey=False) as (panels, files):
        colours = mpl.colormaps["plasma"](np.linspace(0, 0.85, len(sweep)))
        for item, colour in zip(sweep, colours, strict=True):
            _line(panels[0], item, colour, "-")
        through = measured[0].curve("pass_through")
        panels[0].plot(range(1, len(through) + 1), through, ":", color="0.3", label="pass-through")
        if len(sweep) > 1:
            _transition(panels[1], sweep, next((x for x in measured if x.of == layout.pruning), None))
        others = [item for of in layout.compared for item in measured if item.of == of]
        for item, colour, style in zip(others, cycle(figures.COLOURS), cycle(["-", "--"]), strict=False):
            _line(panels[2], item, colour, style)
        for axes in (panels[0], panels[2]):
            axes.axhline(1, color="0.5", linewidth=0.8, linestyle="--")
            figures.log_axis(axes, "y")
            axes.set(xlabel="disturbed block $l$", ylabel="$r_l$ (below 1: absorbed)")
        panels[0].legend(fontsize=5)
        panels[2].legend(fontsize=5, loc="center left", bbox_to_anchor=(1, 0.5))
        panels[0].figure.suptitle(title, fontsize=8)
    return files


def _line(axes: Axes, item: Disturbance, colour: object, style: str) -> None:
    """Coefficients by block."""
    _banded(axes, range(1, len(item.r) + 1), item, "", colour, style, item.label)


def _banded(
    axes: Axes, depth: Sequence[int], item: Disturbance, name: str, colour: object, style: str = "-", label: str = ""
) -> None:
    """A curve with a band of two standard errors, where they are known."""
    values, errors = np.array(item.curve(name)), np.array(item.curve(name, "curve_stderr"))
    axes.plot(depth, values, style, color=colour, label=label)
    if len(errors):
        axes.fill_between(depth, values - 2 * errors, values + 2 * errors, color=colour, alpha=0.15, linewidth=0)


def _transition(axes: Axes, sweep: list[Disturbance], pruned: Disturbance | None) -> None:
    """log2 r over block and size of the noise, with the line where amplification turns into absorption."""
    etas = np.array([item.eta for item in sweep], dtype=float)
    values = np.log2([item.r[:-1] for item in sweep])
    depth = np.arange(1, values.shape[1] + 1)
    mesh = axes.pcolormesh(depth, etas, values, cmap="RdBu_r", vmin=-1.5, vmax=1.5, shading="nearest")
    if min(values.shape) > 1 and values.min() < 0 < values.max():
        axes.contour(depth, etas, values, levels=[0.0], colors="k", linewidths=1)
    if pruned is not None:
        axes.plot(depth, pruned.curve("size")[:-1], ".", color="k", markersize=3)
    axes.set(yscale="log", xlabel="disturbed block $l$", ylabel="η (dots: a pruned block's size)")
    axes.figure.colorbar(mesh, ax=axes, label="log₂ r (line: r = 1)")
