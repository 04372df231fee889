"""Figures of a correction: perplexity against its strength, and the profiles it makes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sparsify.report import figures, frame
from sparsify.report.layouts.corrected import STRENGTH, Corrected
from sparsify.report.select import where

if TYPE_CHECKING:
    from sparsify.report.layouts.correction import Corrections


def strength_figure(
    folder: Path, name: str, layout: Corrections, corrected: Sequence[Corrected], title: str, protocol: str
) -> list[Path]:
    """Perplexity against strength (geometric mean over seeds, band: least to largest); one panel per averaged rule.

    Panels end at ten times the least perplexity: corrections that do more harm leave them.
    """
    panels_of = [_panel(corrected, rule) for rule in layout.averaged]
    shown = [items for items in panels_of if items]
    with figures.saved(folder, name, 2.2 + 2.4 * len(shown), 2.6, max(len(shown), 1)) as (panels, files):
        for axes, items in zip(panels, shown, strict=False):
            for item in items:
                _strength_line(axes, item, layout.value, _colours(layout)[item.label])
            axes.set(title=f"{items[0].rule}, {items[0].pruner} {items[0].sparsity:.0%}", xlabel="strength")
        least = min((float(np.min(line.get_ydata())) for axes in panels for line in axes.lines), default=1.0)
        panels[0].set_ylim(least / 1.3, least * 10)
        figures.log_axis(panels[0], "y")
        panels[0].set_ylabel(f"perplexity ({protocol})")
        _finish(panels, title)
    return files


def _colours(layout: Corrections) -> dict[str, str]:
    """A colour for every correction, the same in all panels."""
    return dict(zip((row.label for row in layout.corrections), cycle(figures.COLOURS), strict=False))


def _finish(panels: list[Axes], title: str) -> None:
    """One legend for what any panel shows."""
    lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    panels[0].figure.legend(list(lines.values()), list(lines), loc="outside right center")
    panels[0].figure.suptitle(title, fontsize=8)


def _panel(corrected: Sequence[Corrected], rule: str) -> list[Corrected]:
    """The corrections of a rule with the first pruner at the highest sparsity."""
    of_rule = [item for item in corrected if item.allocator == rule]
    top = max((item.sparsity for item in of_rule), default=0.0)
    return [item for item in of_rule if item.pruner == of_rule[0].pruner and item.sparsity == top]


def _strength_line(axes: Axes, item: Corrected, value: str, colour: object) -> None:
    by_strength = {0.0: item.plain[value].astype(float)} if len(item.plain) else {}
    for strength in set(item.compared[STRENGTH]):
        by_strength[float(strength)] = where(item.compared, {STRENGTH: strength})[value].astype(float)
    strengths = sorted(by_strength)
    middle = [float(np.exp(np.log(by_strength[x]).mean())) for x in strengths]
    axes.plot(strengths, middle, "o-", markersize=3, color=colour, label=item.label)
    low, high = ([float(getattr(by_strength[x], end)()) for x in strengths] for end in ("min", "max"))
    axes.fill_between(strengths, low, high, color=colour, alpha=0.1, linewidth=0)


def profile_figure(
    folder: Path, name: str, layout: Corrections, corrected: Sequence[Corrected], title: str
) -> list[Path]:
    """Sparsity by block of the rule as it is and of some corrections at their chosen strength, first seed."""
    shown = [items for items in (_panel(corrected, rule) for rule in layout.averaged) if items]
    with figures.saved(folder, name, 2.2 + 2.4 * len(shown), 2.6, max(len(shown), 1)) as (panels, files):
        for axes, items in zip(panels, shown, strict=False):
            if len(items[0].plain):
                _profile(axes, items[0].plain, "plain", "0.2", "--")
            for item in (x for x in items if x.label in layout.profiled):
                _profile(axes, item.chosen, item.label, _colours(layout)[item.label], "-")
            axes.set(title=f"{items[0].rule}, {items[0].pruner} {items[0].sparsity:.0%}", xlabel="block")
        panels[0].set_ylabel("sparsity (counted zeros)")
        _finish(panels, title)
    return files


def _profile(axes: Axes, cells: pd.DataFrame, label: str, colour: object, style: str) -> None:
    profile = next(iter(frame.profiles(cells.sort_index().iloc[:1]).values()))
    axes.plot(range(1, len(profile) + 1), profile, style, color=colour, linewidth=1, label=label)
