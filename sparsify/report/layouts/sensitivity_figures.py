"""Damage against what foretells it, unit by unit, and both over depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sparsify.report import figures
from sparsify.report.correlation import RankCorrelation

if TYPE_CHECKING:
    from sparsify.report.layouts.sensitivity import Damage, Predictor

MARKERS = "osD^vP*X"
LABELLED = {3: (1, 2, 4, 6, 8), 30: (1, 2, 5), 300: (1, 3)}
"""Which multiples of a power of ten a log axis names, by how many times its upper end is its lower one."""
DAMAGE = "rise of the loss, nats"


def scatter(folder: Path, name: str, measured: list[Damage], drawn: list[Predictor], title: str) -> list[Path]:
    """A panel per predictor and way of pruning: damage against it, on log axes.

    Blocks are coloured by depth, matrices by kind. An axis with values that are not positive is linear around zero.
    """
    shown = [damage for damage in measured if damage.row.drawn] or measured[:1]
    columns, rows = len(drawn), len(shown)
    width, height = 0.9 + 1.9 * columns, 0.5 + 1.8 * rows
    with figures.saved(folder, name, width, height, columns * rows, False, rows) as (panels, files):
        for i, damage in enumerate(shown):
            line = panels[i * columns : (i + 1) * columns]
            empty = [axes for axes, p in zip(line, drawn, strict=True) if not _scattered(axes, damage, p)]
            for axes in empty:
                axes.set_axis_off()
            line[0].set_ylabel(f"{damage.row.label}\n{DAMAGE}")
            _explain(line, empty, damage)
        panels[0].figure.suptitle(title, fontsize=8)
    return files


def depth(folder: Path, name: str, measured: list[Damage], drawn: list[Predictor], title: str) -> list[Path]:
    """Damage of pruning each block alone, and what foretells it, over depth; bands are one standard error."""
    blocks = [damage for damage in measured if not damage.kinds]
    kinds = next((damage.kinds for damage in measured if damage.kinds), ())
    predictors = [p for p in drawn if any(damage.predicted(p) for damage in blocks)]
    total = 1 + len(predictors)
    with figures.saved(folder, name, 0.4 + 2.0 * total, 2.6, total, False) as (panels, files):
        for damage, colour in zip(blocks, cycle(figures.COLOURS), strict=False):
            _damage(panels[0], damage, colour)
        panels[0].set(ylabel=DAMAGE, title="one block pruned alone")
        for axes, predictor in zip(panels[1:], predictors, strict=True):
            _predictor(axes, predictor, blocks, kinds)
        for axes in panels:
            drawn_values = [float(value) for line in axes.get_lines() for value in np.asarray(line.get_ydata())]
            _log(axes, "y", drawn_values)
            axes.set_xlabel("block")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=5, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
        panels[0].figure.suptitle(title, fontsize=8)
    return files


def _scattered(axes: Axes, damage: Damage, predictor: Predictor) -> bool:
    """One panel; whether there was anything to draw."""
    x, y = damage.pooled(predictor)
    if not x:
        return False
    start = 0
    for kind, colour, marker in zip(damage.kinds or ("",), cycle(figures.COLOURS), cycle(MARKERS), strict=False):
        stop = start + len(damage.values(kind))
        colours: Any = colour if kind else mpl.colormaps["viridis"](np.linspace(0, 1, stop))
        axes.scatter(x[start:stop], y[start:stop], s=10, c=colours, marker=marker, linewidths=0, alpha=0.8)
        start = stop
    _log(axes, "x", x)
    _log(axes, "y", y)
    axes.set_title(f"ρ = {RankCorrelation.of(x, y)}", fontsize=7)
    axes.set_xlabel(predictor.label)
    return True


def _explain(line: list[Axes], empty: list[Axes], damage: Damage) -> None:
    """The key of a row's colours, in an empty panel where there is one."""
    if not damage.kinds:
        shades = mpl.cm.ScalarMappable(mpl.colors.Normalize(1, len(damage.values())), "viridis")
        line[0].figure.colorbar(shades, ax=line[-1], label="block")
        return
    entries = zip(damage.kinds, cycle(figures.COLOURS), cycle(MARKERS), strict=False)
    handles = [
        mpl.lines.Line2D([], [], color=colour, marker=marker, linestyle="", label=kind)
        for kind, colour, marker in entries
    ]
    options: dict[str, Any] = {} if empty else {"bbox_to_anchor": (1, 0.5)}
    (empty or line)[-1].legend(handles=handles, loc="center left", fontsize=6, **options)


def _damage(axes: Axes, damage: Damage, colour: str) -> None:
    curve, errors = np.array(damage.values()), np.array(damage.values(of="curve_stderr"))
    where = range(1, len(curve) + 1)
    axes.plot(where, curve, "-", color=colour, label=damage.row.label)
    if len(errors):
        floor = curve[curve > 0].min(initial=np.inf) / 2
        axes.fill_between(
            where, np.maximum(curve - errors, floor), curve + errors, color=colour, alpha=0.15, linewidth=0
        )


def _predictor(axes: Axes, predictor: Predictor, blocks: Sequence[Damage], kinds: Sequence[str]) -> None:
    """A line for each percent of zeros that it is measured at; where there is none, one for each kind of matrix too."""
    lines = {damage.row.at if "{at}" in predictor.of else None: damage for damage in blocks}
    for (at, damage), colour in zip(lines.items(), cycle(figures.COLOURS), strict=False):
        curve = damage.predicted(predictor)
        label = "whole block" if at is None else f"at {at}%"
        axes.plot(range(1, len(curve) + 1), curve, "-", color="k" if at is None else colour, label=label)
    if None in lines:
        for kind, colour in zip(kinds, cycle(figures.COLOURS), strict=False):
            curve = lines[None].predicted(predictor, kind)
            axes.plot(range(1, len(curve) + 1), curve, "-", color=colour, linewidth=0.6, label=kind.split(".")[-1])
    axes.set_title(predictor.label)


def _log(axes: Axes, which: str, values: Sequence[float]) -> None:
    """A log axis with few names; linear up to the power of ten above the median where some values are not positive."""
    axis, scale = (axes.xaxis, axes.set_xscale) if which == "x" else (axes.yaxis, axes.set_yscale)
    if not values or min(values) <= 0:
        median = float(np.median(np.abs(values))) if values else 0.0
        scale("symlog", linthresh=10.0 ** math.ceil(math.log10(median or 1.0)))
        axes.autoscale_view()
        return
    scale("log")
    subs = next((subs for reach, subs in LABELLED.items() if max(values) < reach * min(values)), (1,))
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
