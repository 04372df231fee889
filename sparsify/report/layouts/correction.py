"""What a correction does to each rule: perplexity over seeds, zero-shot, against controls, and the paper's averages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from sparsify.report.layouts.accuracy import with_mean
from sparsify.report.layouts.base import Layout, Page, Row
from sparsify.report.layouts.corrected import STRENGTH, Corrected, corrections
from sparsify.report.layouts.correction_figures import profile_figure, strength_figure
from sparsify.report.numbers import paper_numbers
from sparsify.report.select import where
from sparsify.report.spread import Spread


@dataclass(frozen=True)
class Rule:
    """A rule that is corrected.

    Attributes:
        label: as printed.
        allocator: its config name.
    """

    label: str
    allocator: str


@dataclass(frozen=True)
class ZeroShot:
    """The zero-shot column.

    Attributes:
        value: name of the mean.
        tasks: evaluations that it is over.
    """

    value: str
    tasks: list[str]


@dataclass(frozen=True, kw_only=True)
class Corrections(Layout):
    """Every rule plain, corrected and with controls; the correction over the controls; the paper's averages.

    Attributes:
        minimise: the evaluation that chooses the strength, for each seed.
        pruners: groups of rows, in order.
        rules: what is corrected.
        corrections: rows below each rule; the first is the correction itself, the others are held against it.
        averaged: allocators that the paper's averages are over.
        profiled: labels of the corrections in the figure of profiles.
        zeroshot: the zero-shot column.
        paper: CSV of the paper's averages.
    """

    minimise: str
    pruners: list[str]
    rules: list[Rule]
    corrections: list[Row]
    averaged: list[str]
    profiled: list[str] = field(default_factory=list)
    zeroshot: ZeroShot
    paper: str

    def write(self, page: Page) -> list[Path]:
        """Tables, and figures of strengths and profiles."""
        corrected, accuracy = corrections(self, page.cells), accuracies(self, page.cells)
        more = [(f"{page.title}: the paper's averages", averages(self, corrected, accuracy))]
        if len(rivals := against(self, corrected)):
            more.insert(0, (f"{page.title}: corrected over the others, below zero it is the better one", rivals))
        files = page.write(summary(self, corrected, accuracy), more)
        protocol = str(page.cells[f"{self.value}.protocol"].iloc[0])
        strength, profile = (f"{kind}_{page.name}_{page.stem}" for kind in ("strength", "layer_profile"))
        files += strength_figure(page.figures, strength, self, corrected, page.title, protocol)
        return files + profile_figure(page.figures, profile, self, corrected, page.title)


Accuracy = Callable[[str, float, str, str | None], dict[int, float]]
"""Mean accuracy in percent by seed, for a pruner, sparsity, rule and label of the correction (None: the plain rule)."""


def accuracies(layout: Corrections, cells: pd.DataFrame) -> Accuracy:
    """Look-up of the zero-shot cells that have run."""
    tasks = layout.zeroshot.tasks
    some = cells.reindex(columns=list(tasks)).notna().all(axis=1).any()
    measured = with_mean(cells, tasks, layout.zeroshot.value) if some else cells.iloc[:0]
    meaning = {row.label: row.where for row in layout.corrections}

    def look_up(pruner: str, sparsity: float, rule: str, label: str | None) -> dict[int, float]:
        conditions = {"pruner": pruner, "sparsity": sparsity, "allocator": rule if label is None else "absorption"}
        if label is not None:
            conditions |= {"allocator.inner": rule, STRENGTH: "auto", **meaning[label]}
        cells = where(measured, conditions)
        return {} if cells.empty else dict(zip(cells["seed"], 100 * cells[layout.zeroshot.value], strict=True))

    return look_up


def summary(layout: Corrections, corrected: Sequence[Corrected], accuracy: Accuracy) -> pd.DataFrame:
    """Rows (pruner, sparsity, rule and correction): perplexity, change, chosen strengths, zero-shot and its change."""
    rows: dict[tuple[str, str], list[str]] = {}
    grid = {float(x) for item in corrected for x in item.compared[STRENGTH]}
    for item in corrected:
        at = (item.pruner, item.sparsity, item.allocator)
        group, plain, shown = _group(item), accuracy(*at, None), accuracy(*at, item.label)
        rows.setdefault((group, item.rule), [_perplexity(item.plain, layout.value), "", "", _mean(plain), ""])
        rows[group, f"{item.rule}, {item.label}"] = [
            _perplexity(item.chosen, layout.value),
            change(item.changes(layout.value)),
            _strengths(item, grid),
            _mean(shown),
            points(_gains(plain, shown)),
        ]
    columns = [("perplexity", ""), ("change", ""), ("strength", ""), ("zero-shot", ""), ("zero-shot", "change")]
    index = pd.MultiIndex.from_tuples(list(rows), names=["pruner", "allocation"])
    return pd.DataFrame(list(rows.values()), index=index, columns=pd.MultiIndex.from_tuples(columns))


def _group(item: Corrected) -> str:
    return f"{item.pruner} {item.sparsity:.0%}"


def _perplexity(cells: pd.DataFrame, value: str) -> str:
    return str(Spread.of(list(cells[value]))) if len(cells) else "–"


def _mean(by_seed: dict[int, float]) -> str:
    return str(Spread.of(list(by_seed.values()))) if by_seed else ""


def change(logs: Mapping[int, float]) -> str:
    """`-7.1% [-9.0, -5.2]`: the geometric mean over seeds of ratios with its 95% interval."""
    return _with_interval(logs, lambda log: 100 * math.expm1(log), "+.1f", "%")


def points(differences: Mapping[int, float]) -> str:
    """`+1.02 [+0.50, +1.54]`: the mean over seeds of differences with its 95% interval."""
    return _with_interval(differences, lambda difference: difference, "+.2f", "")


def _with_interval(by_seed: Mapping[int, float], shown: Callable[[float], float], digits: str, unit: str) -> str:
    """Mean of some values and its interval, as `shown` makes them; without an interval for a single one."""
    if not by_seed:
        return ""
    spread = Spread.of(list(by_seed.values()))
    middle = f"{shown(spread.mean):{digits}}{unit}"
    low, high = (f"{shown(spread.mean + side * spread.half):{digits}}" for side in (-1, 1))
    return middle if spread.n < 2 else f"{middle} [{low}, {high}]"


def _gains(before: dict[int, float], after: dict[int, float]) -> dict[int, float]:
    """Points of accuracy that every seed with both gains."""
    return {seed: after[seed] - before[seed] for seed in sorted(before.keys() & after.keys())}


def _strengths(item: Corrected, grid: set[float]) -> str:
    """Chosen strengths with how often, and of which where not the whole grid has run."""
    counts = Counter(float(x) for x in item.chosen[STRENGTH])
    several = len(item.chosen) > 1
    text = ", ".join(f"{x:g} ({n})" if several else f"{x:g}" for x, n in sorted(counts.items()))
    had = sorted({float(x) for x in item.compared[STRENGTH]})
    return text if set(had) == grid else f"{text} of {', '.join(f'{x:g}' for x in had)}"


def against(layout: Corrections, corrected: Sequence[Corrected]) -> pd.DataFrame:
    """The correction over each other one of the same rule, seed by seed: below zero it is the better one."""
    first, *others = (row.label for row in layout.corrections)
    rows = {}
    for item in (x for x in corrected if x.label == first):
        same = {x.label: x for x in corrected if (_group(x), x.rule) == (_group(item), item.rule)}
        texts = [change(item.changes(layout.value, same[label].chosen)) if label in same else "" for label in others]
        if any(texts):
            rows[_group(item), item.rule] = texts
    index = pd.MultiIndex.from_tuples(list(rows), names=["pruner", "allocation"])
    return pd.DataFrame(list(rows.values()), index=index, columns=pd.MultiIndex.from_product([others, [""]]))


def averages(layout: Corrections, corrected: Sequence[Corrected], accuracy: Accuracy) -> pd.DataFrame:
    """The change averaged over the paper's rules, where all of them have run, with the paper's average beside."""
    paper = paper_numbers(layout.paper)
    first = [item for item in corrected if item.label == layout.corrections[0].label]
    rows: dict[tuple[str, str], list[str]] = {}
    for pruner, sparsity in dict.fromkeys((item.pruner, item.sparsity) for item in first):
        here = [x for x in first if (x.pruner, x.sparsity) == (pruner, sparsity) and x.allocator in layout.averaged]
        logs = [item.changes(layout.value) for item in here]
        gains = [_gains(*(accuracy(pruner, sparsity, x.allocator, label) for label in (None, x.label))) for x in here]
        theirs = where(paper, {"sparsity": sparsity}).set_index("metric")["value"]
        ours, more = (_over_rules(values, len(layout.averaged)) for values in (logs, gains))
        rows[f"{pruner} {sparsity:.0%}", "mean of " + " and ".join(layout.averaged)] = [
            change(ours) or "–",
            f"{theirs['perplexity']:+.2f}%" if "perplexity" in theirs else "",
            points(more) or "–",
            f"{theirs['accuracy']:+.2f}" if "accuracy" in theirs else "",
        ]
    columns = [(metric, whose) for metric in ("perplexity", "zero-shot") for whose in ("ours", "paper")]
    index = pd.MultiIndex.from_tuples(list(rows), names=["pruner", "allocation"])
    return pd.DataFrame(list(rows.values()), index=index, columns=pd.MultiIndex.from_tuples(columns))


def _over_rules(by_rule: Sequence[Mapping[int, float]], rules: int) -> dict[int, float]:
    """Mean over the rules for every seed that has all of them."""
    if len(by_rule) < rules:
        return {}
    seeds = set.intersection(*(set(values) for values in by_rule))
    return {seed: float(np.mean([values[seed] for values in by_rule])) for seed in sorted(seeds)}
