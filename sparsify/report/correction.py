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
        every: cells of all strengths.
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
    cells = cells[~_searched(cells)]
    for pruner in layout.pruners:
        for sparsity in sorted(s for s in cells["sparsity"].unique() if s):
            for rule in layout.rules:
                here = where(cells, {"pruner": pruner, "sparsity": sparsity})
                plain = where(here, {"allocator": rule.allocator}).set_index("seed")
                for item in layout.corrections:
                    inner = {"allocator": "absorption", "allocator.inner": rule.allocator}
                    every = where(here, {**inner, **item.where})
                    chosen = _best_by_seed(every, layout.minimise)
                    row = (pruner, float(sparsity), rule.label, rule.allocator, item.label, plain, chosen, every)
                    found += [Corrected(*row)] if len(chosen) and len(plain) else []
    return found


def _searched(cells: pd.DataFrame) -> pd.Series:
    """Cells that searched their strength themselves: they are for the zero-shot columns."""
    strength = cells[STRENGTH] if STRENGTH in cells else pd.Series("", index=cells.index)
    return strength == "auto"


def _best_by_seed(cells: pd.DataFrame, minimise: str) -> pd.DataFrame:
    best = [pick(part, minimise) for _, part in cells.groupby("seed")]
    return pd.DataFrame([row for row in best if row is not None]).set_index("seed") if len(cells) else cells


Accuracy = Callable[[str, float, str, str | None], float | None]
"""Mean accuracy by pruner, sparsity, rule and source of the correction (None: the plain rule)."""


def accuracies(layout: DictConfig, cells: pd.DataFrame) -> Accuracy:
    """Look-up of the zero-shot cells that have run."""
    tasks = list(layout.zeroshot.tasks)
    some = cells.reindex(columns=tasks).notna().all(axis=1).any()
    measured = with_mean(layout.zeroshot, cells) if some else cells.iloc[:0]

    def look_up(pruner: str, sparsity: float, rule: str, source: str | None) -> float | None:
        conditions = {"pruner": pruner, "sparsity": sparsity, "allocator": rule if source is None else "absorption"}
        if source is not None:
            conditions |= {"allocator.inner": rule, "allocator.source": source, STRENGTH: "auto"}
        found = where(measured, conditions)
        return None if found.empty else 100 * float(found.iloc[0][layout.zeroshot.value])

    return look_up


def summary(layout: DictConfig, found: Sequence[Corrected], accuracy: Accuracy) -> pd.DataFrame:
    """Rows (pruner, sparsity, rule and correction): perplexity, change, chosen strengths, zero-shot and its change."""
    rows: dict[tuple[str, str], list[str]] = {}
    for item in found:
        at = (item.pruner, item.sparsity, item.allocator)
        group, plain = f"{item.pruner} {item.sparsity:.0%}", accuracy(*at, None)
        rows.setdefault(
            (group, item.rule), [str(Spread.of(list(item.plain[layout.value]))), "", "", _percent(plain), ""]
        )
        source = next(row["where"] for row in layout.corrections if row.label == item.label)
        shown = accuracy(*at, source["allocator.source"]) if source["allocator.control"] == "none" else None
        rows[group, f"{item.rule}, {item.label}"] = [
            str(Spread.of(list(item.chosen[layout.value]))),
            change(item.changes(layout.value)),
            _strengths(item.chosen[STRENGTH]),
            _percent(shown),
            "" if shown is None or plain is None else f"{shown - plain:+.2f}",
        ]
    columns = [("perplexity", ""), ("change", ""), ("strength", ""), ("zero-shot", ""), ("zero-shot", "change")]
    index = pd.MultiIndex.from_tuples(list(rows), names=["pruner", "allocation"])
    return pd.DataFrame(list(rows.values()), index=index, columns=pd.MultiIndex.from_tuples(columns))


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


def _strengths(values: pd.Series) -> str:
    counts = Counter(float(x) for x in values)
    return ", ".join(f"{x:g} ({n})" if len(values) > 1 else f"{x:g}" for x, n in sorted(counts.items()))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def averages(layout: DictConfig, found: Sequence[Corrected], accuracy: Accuracy) -> pd.DataFrame:
    """The change averaged over the rules that the paper averages over, the paper's number beside ours."""
    paper = paper_numbers(layout)
    rows: dict[tuple[str, str], list[str]] = {}
    for item in (item for item in found if item.label == layout.corrections[0].label):
        key = (f"{item.pruner} {item.sparsity:.0%}", "mean of " + " and ".join(layout.averaged))
        if key not in rows:
            same = [x for x in found if _place(x) == _place(item) and x.allocator in layout.averaged]
            logs = [float(np.mean(x.changes(layout.value))) for x in same]
            points = [gain for rule in layout.averaged if (gain := _gain(item, rule, accuracy)) is not None]
            theirs = where(paper, {"sparsity": item.sparsity}).set_index("metric")["value"]
            rows[key] = [
                f"{100 * math.expm1(np.mean(logs)):+.2f}%" if logs else "",
                f"{theirs['perplexity']:+.2f}%" if "perplexity" in theirs else "",
                f"{np.mean(points):+.2f}" if points else "",
                f"{theirs['accuracy']:+.2f}" if "accuracy" in theirs else "",
            ]
    columns = [(metric, whose) for metric in ("perplexity", "zero-shot") for whose in ("ours", "paper")]
    index = pd.MultiIndex.from_tuples(list(rows), names=["pruner", "allocation"])
    return pd.DataFrame(list(rows.values()), index=index, columns=pd.MultiIndex.from_tuples(columns))


def _gain(item: Corrected, rule: str, accuracy: Accuracy) -> float | None:
    """Points of zero-shot accuracy that the correction brings a rule."""
    before, after = (accuracy(item.pruner, item.sparsity, rule, source) for source in (None, "pruned"))
    return None if before is None or after is None else after - before


def _place(item: Corrected) -> tuple[str, float, str]:
    return item.pruner, item.sparsity, item.label


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
    """The corrections of a rule where most of them have run: the first pruner, the highest sparsity."""
    of_rule = [item for item in found if item.allocator == rule]
    top = max((item.sparsity for item in of_rule), default=0.0)
    return [item for item in of_rule if item.pruner == of_rule[0].pruner and item.sparsity == top]


def _strength_line(axes: Axes, item: Corrected, value: str, colour: object) -> None:
    by_strength = {0.0: item.plain[value].astype(float)}
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
