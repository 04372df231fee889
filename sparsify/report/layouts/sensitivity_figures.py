"""Damage against what foretells it, unit by unit, and both over depth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from numpy import ndarray

from sparsify.report import figures
from sparsify.report.correlation import RankCorrelation

if TYPE_CHECKING:
    from sparsify.report.layouts.sensitivity import Damage, Predictor

MARKERS = "osD^vP*X"
DAMAGE = "rise of the loss, nats"


def scatter(folder: Path, name: str, measured: list[Damage], drawn: list[Predictor], title: str) -> list[Path]:
    """A panel per predictor and way of pruning: damage against it, on log axes.

    Blocks are coloured by depth, matrices by kind. Values that are not positive stand hollow at the edge.
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
    with figures.saved(folder, name, 1.2 + 1.9 * total, 2.4, total, False) as (panels, files):
        for damage, colour in zip(blocks, cycle(figures.COLOURS), strict=False):
            _damage(panels[0], damage, colour)
        panels[0].set(ylabel=DAMAGE, title="one block pruned alone")
        for axes, predictor in zip(panels[1:], predictors, strict=True):
            _predictor(axes, predictor, blocks, kinds)
        for axes in panels:
            _log(axes, "y")
            axes.set_xlabel("block")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=5)
        panels[0].figure.suptitle(title, fontsize=8)
    return files


def _scattered(axes: Axes, damage: Damage, predictor: Predictor) -> bool:
    """One panel; whether there was anything to draw."""
    pooled = damage.pooled(predictor)
    if not pooled[0]:
        return False
    values = [_positive(np.array(values)) for values in pooled]
    start = 0
    for kind, colour, marker in zip(damage.kinds or ("",), cycle(figures.COLOURS), cycle(MARKERS), strict=False):
        place = slice(start, start + len(damage.values(kind)))
        start = place.stop
        colours = [colour] * (place.stop - place.start) if kind else _by_depth(place.stop)
        _points(axes, [value[place] for value, _ in values], [low[place] for _, low in values], colours, marker)
    _log(axes, "x")
    _log(axes, "y")
    axes.set_title(f"ρ = {RankCorrelation.of(*pooled)}", fontsize=7)
    axes.set_xlabel(predictor.label)
    return True


def _points(axes: Axes, values: list[Any], low: list[Any], colours: list[Any], marker: str) -> None:
    hollow = low[0] | low[1]
    edges = np.array([mpl.colors.to_rgba(colour) for colour in colours])
    for which, faces in ((~hollow, edges[~hollow]), (hollow, "none")):
        x, y = (value[which] for value in values)
        axes.scatter(x, y, s=11, marker=marker, facecolors=faces, edgecolors=edges[which], linewidths=0.6, alpha=0.85)


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


def _positive(values: Float[ndarray, " units"]) -> tuple[Float[ndarray, " units"], Any]:
    """Values for a log axis, those that have no place on it at half the least that has one; and which these are."""
    low = values <= 0
    least = values[~low].min(initial=np.inf)
    return np.where(low, (least if np.isfinite(least) else 1.0) / 2, values), low


def _by_depth(blocks: int) -> list[Any]:
    return list(mpl.colormaps["viridis"](np.linspace(0, 1, blocks)))


def _log(axes: Axes, which: str) -> None:
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
