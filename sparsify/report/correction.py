"""What a correction does to each rule: perplexity over seeds, paired change, zero-shot, and the paper's averages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from omegaconf import DictConfig

from sparsify.report import figures, frame
from sparsify.report.accuracy import with_mean
from sparsify.report.select import pick, where
from sparsify.report.spread import Spread
from sparsify.report.table import paper_numbers

STRENGTH = "allocator.strength"


@dataclass(frozen=True)
class Corrected:
    """One rule at one sparsity with one correction, by seed.

    Attributes:
        pruner: config name.
        sparsity: wanted.
        rule: label of the rule.
        allocator: its config name.
        label: of the correction.
        plain: cells of the rule as it is, index by seed.
        chosen: cells of the best strength for each seed, index by seed.
        every: cells of the strengths that all seeds of this row have, which are those to choose among.
    """

    pruner: str
    sparsity: float
    rule: str
    allocator: str
    label: str
    plain: pd.DataFrame
    chosen: pd.DataFrame
    every: pd.DataFrame

    def changes(self, value: str) -> list[float]:
        """log(corrected / plain) of every seed that has both."""
        seeds = self.chosen.index.intersection(self.plain.index)
        return [math.log(self.chosen.loc[s, value] / self.plain.loc[s, value]) for s in seeds]


def corrections(layout: DictConfig, cells: pd.DataFrame) -> list[Corrected]:
    """Every rule and correction of the layout that has run, in reading order."""
    found = []
    cells = cells[~_searched(cells) & cells[[layout.value, layout.minimise]].notna().all(axis=1)]
    for pruner in layout.pruners:
        for sparsity in sorted(s for s in cells["sparsity"].unique() if s):
            here = where(cells, {"pruner": pruner, "sparsity": sparsity})
            for rule in layout.rules:
                plain = where(here, {"allocator": rule.allocator}).set_index("seed")
                for item in layout.corrections:
                    inner = {"allocator": "absorption", "allocator.inner": rule.allocator}
                    every = _comparable(where(here, {**inner, **item.where}))
                    chosen = _best_by_seed(every, layout.minimise)
                    row = (pruner, float(sparsity), rule.label, rule.allocator, item.label, plain, chosen, every)
                    found += [Corrected(*row)] if len(chosen) else []
    return found


def _searched(cells: pd.DataFrame) -> pd.Series:
    """Cells that searched their strength themselves: they are for the zero-shot columns."""
    strength = cells[STRENGTH] if STRENGTH in cells else pd.Series("", index=cells.index)
    return strength == "auto"


def _comparable(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of those strengths that the most seeds have, so that all seeds choose among the same."""
    if cells.empty:
        return cells
    seeds = {strength: set(part["seed"]) for strength, part in cells.groupby(STRENGTH)}
    most = max(len(found) for found in seeds.values())
    return cells[cells[STRENGTH].map(lambda strength: len(seeds[strength]) == most)]


def _best_by_seed(cells: pd.DataFrame, minimise: str) -> pd.DataFrame:
    best = [pick(part, minimise) for _, part in cells.groupby("seed")] if len(cells) else []
    return pd.DataFrame([row for row in best if row is not None]).set_index("seed") if best else cells


Accuracy = Callable[[str, float, str, str | None], float | None]
"""Mean accuracy in percent by pruner, sparsity, rule and label of the correction (None: the plain rule)."""


def accuracies(layout: DictConfig, cells: pd.DataFrame) -> Accuracy:
    """Look-up of the zero-shot cells that have run."""
    tasks = list(layout.zeroshot.tasks)
    some = cells.reindex(columns=tasks).notna().all(axis=1).any()
    measured = with_mean(layout.zeroshot, cells) if some else cells.iloc[:0]

    meaning = {str(row.label): dict(row["where"]) for row in layout.corrections}

    def look_up(pruner: str, sparsity: float, rule: str, label: str | None) -> float | None:
        conditions = {"pruner": pruner, "sparsity": sparsity, "allocator": rule if label is None else "absorption"}
        if label is not None:
            conditions |= {"allocator.inner": rule, STRENGTH: "auto", **meaning[label]}
        cell = pick(where(measured, conditions), None)
        return None if cell is None else 100 * float(cell[layout.zeroshot.value])

    return look_up


def summary(layout: DictConfig, found: Sequence[Corrected], accuracy: Accuracy) -> pd.DataFrame:
    """Rows (pruner, sparsity, rule and correction): perplexity, change, chosen strengths, zero-shot and its change."""
    rows: dict[tuple[str, str], list[str]] = {}
    grid = {float(x) for item in found for x in item.every[STRENGTH]}
    for item in found:
        at = (item.pruner, item.sparsity, item.allocator)
        group, plain, shown = f"{item.pruner} {item.sparsity:.0%}", accuracy(*at, None), accuracy(*at, item.label)
        rows.setdefault((group, item.rule), [_spread(item.plain, layout.value), "", "", _percent(plain), ""])
        rows[group, f"{item.rule}, {item.label}"] = [
            _spread(item.chosen, layout.value),
            change(item.changes(layout.value)),
            _strengths(item, grid),
            _percent(shown),
            "" if shown is None or plain is None else f"{shown - plain:+.2f}",
        ]
    columns = [("perplexity", ""), ("change", ""), ("strength", ""), ("zero-shot", ""), ("zero-shot", "change")]
    index = pd.MultiIndex.from_tuples(list(rows), names=["pruner", "allocation"])
    return pd.DataFrame(list(rows.values()), index=index, columns=pd.MultiIndex.from_tuples(columns))


def _spread(cells: pd.DataFrame, value: str) -> str:
    return str(Spread.of(list(cells[value]))) if len(cells) else "–"


def change(logs: Sequence[float]) -> str:
    """`-7.1% [-9.0, -5.2]`: the geometric mean of ratios with its 95% interval."""
    if not len(logs):
        return ""
    spread = Spread.of(logs)
    middle = f"{100 * math.expm1(spread.mean):+.1f}%"
    if spread.n < 2:
        return middle
    low, high = (100 * math.expm1(spread.mean + side * spread.half) for side in (-1, 1))
    return f"{middle} [{low:+.1f}, {high:+.1f}]"


def _strengths(item: Corrected, grid: set[float]) -> str:
    """Chosen strengths with how often, and of which where not the whole grid has run."""
    counts = Counter(float(x) for x in item.chosen[STRENGTH])
    several = len(item.chosen) > 1
    text = ", ".join(f"{x:g} ({n})" if several else f"{x:g}" for x, n in sorted(counts.items()))
    had = sorted({float(x) for x in item.every[STRENGTH]})
    return text if set(had) == grid else f"{text} of {', '.join(f'{x:g}' for x in had)}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def averages(layout: DictConfig, found: Sequence[Corrected], accuracy: Accuracy) -> pd.DataFrame:
    """The change averaged over the paper's rules, where all of them have run, with the paper's average beside."""
    paper = paper_numbers(layout)
    first = [item for item in found if item.label == layout.corrections[0].label]
    rows: dict[tuple[str, str], list[str]] = {}
    for pruner, sparsity in dict.fromkeys((item.pruner, item.sparsity) for item in first):
        here = {item.allocator: item for item in first if (item.pruner, item.sparsity) == (pruner, sparsity)}
        logs = [here[rule].changes(layout.value) for rule in layout.averaged if rule in here]
        points = [_gain(accuracy, pruner, sparsity, rule, first[0].label) for rule in layout.averaged]
        theirs = where(paper, {"sparsity": sparsity}).set_index("metric")["value"]
        whole = len(logs) == len(layout.averaged) and all(logs)
        rows[f"{pruner} {sparsity:.0%}", "mean of " + " and ".join(layout.averaged)] = [
            f"{100 * math.expm1(np.mean([np.mean(x) for x in logs])):+.2f}%" if whole else "–",
            f"{theirs['perplexity']:+.2f}%" if "perplexity" in theirs else "",
            "–" if None in points else f"{np.mean([x for x in points if x is not None]):+.2f}",
            f"{theirs['accuracy']:+.2f}" if "accuracy" in theirs else "",
        ]
    columns = [(metric, whose) for metric in ("perplexity", "zero-shot") for whose in ("ours", "paper")]
    index = pd.MultiIndex.from_tuples(list(rows), names=["pruner", "allocation"])
    return pd.DataFrame(list(rows.values()), index=index, columns=pd.MultiIndex.from_tuples(columns))


def _gain(accuracy: Accuracy, pruner: str, sparsity: float, rule: str, label: str) -> float | None:
    """Points of zero-shot accuracy that a correction brings a rule."""
    before, after = accuracy(pruner, sparsity, rule, None), accuracy(pruner, sparsity, rule, label)
    return None if before is None or after is None else after - before


def strength_figure(
    folder: Path, name: str, layout: DictConfig, found: Sequence[Corrected], title: str, protocol: str
) -> list[Path]:
    """Perplexity against strength (geometric mean over seeds, band: least to largest); one panel per averaged rule."""
    panels_of = [_panel(found, rule) for rule in layout.averaged]
    shown = [items for items in panels_of if items]
    with figures.saved(folder, name, 2.2 + 2.4 * len(shown), 2.6, max(len(shown), 1)) as (panels, files):
        for axes, items in zip(panels, shown, strict=False):
            for item in items:
                _strength_line(axes, item, layout.value, _colours(layout)[item.label])
            figures.log_axis(axes, "y")
            axes.set(title=f"{items[0].rule}, {items[0].pruner} {items[0].sparsity:.0%}", xlabel="strength")
        panels[0].set_ylabel(f"perplexity ({protocol})")
        _finish(panels, title)
    return files


def _colours(layout: DictConfig) -> dict[str, str]:
    """A colour for every correction, the same in all panels."""
    return dict(zip((str(row.label) for row in layout.corrections), cycle(figures.COLOURS), strict=False))


def _finish(panels: list[Axes], title: str) -> None:
    """One legend for what any panel shows."""
    lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    panels[0].figure.legend(list(lines.values()), list(lines), loc="outside right center")
    panels[0].figure.suptitle(title, fontsize=8)


def _panel(found: Sequence[Corrected], rule: str) -> list[Corrected]:
    """The corrections of a rule with the first pruner at the highest sparsity."""
    of_rule = [item for item in found if item.allocator == rule]
    top = max((item.sparsity for item in of_rule), default=0.0)
    return [item for item in of_rule if item.pruner == of_rule[0].pruner and item.sparsity == top]


def _strength_line(axes: Axes, item: Corrected, value: str, colour: object) -> None:
    by_strength = {0.0: item.plain[value].astype(float)} if len(item.plain) else {}
    for strength in set(item.every[STRENGTH]):
        by_strength[float(strength)] = where(item.every, {STRENGTH: strength})[value].astype(float)
    strengths = sorted(by_strength)
    middle = [float(np.exp(np.log(by_strength[x]).mean())) for x in strengths]
    axes.plot(strengths, middle, "o-", markersize=3, color=colour, label=item.label)
    low, high = ([float(getattr(by_strength[x], end)()) for x in strengths] for end in ("min", "max"))
    axes.fill_between(strengths, low, high, color=colour, alpha=0.1, linewidth=0)


def profile_figure(folder: Path, name: str, layout: DictConfig, found: Sequence[Corrected], title: str) -> list[Path]:
    """Sparsity by block of the rule as it is and of each correction at its chosen strength, first seed."""
    shown = [items for items in (_panel(found, rule) for rule in layout.averaged) if items]
    with figures.saved(folder, name, 2.2 + 2.4 * len(shown), 2.6, max(len(shown), 1)) as (panels, files):
        for axes, items in zip(panels, shown, strict=False):
            if len(items[0].plain):
                _profile(axes, items[0].plain, "plain", "0.2", "--")
            for item in items:
                _profile(axes, item.chosen, item.label, _colours(layout)[item.label], "-")
            axes.set(title=f"{items[0].rule}, {items[0].pruner} {items[0].sparsity:.0%}", xlabel="block")
        panels[0].set_ylabel("sparsity (counted zeros)")
        _finish(panels, title)
    return files


def _profile(axes: Axes, cells: pd.DataFrame, label: str, colour: object, style: str) -> None:
    profile = next(iter(frame.profiles(cells.sort_index().iloc[:1]).values()))
    axes.plot(range(1, len(profile) + 1), profile, style, color=colour, linewidth=1, label=label)
