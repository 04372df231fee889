"""What a correction does to each rule: perplexity over seeds, zero-shot, against controls, and the paper's averages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from omegaconf import DictConfig

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
        every: cells of the strengths and seeds that count: every one of these seeds has every one of these strengths.
    """

    pruner: str
    sparsity: float
    rule: str
    allocator: str
    label: str
    plain: pd.DataFrame
    chosen: pd.DataFrame
    every: pd.DataFrame

    def changes(self, value: str, against: pd.DataFrame | None = None) -> dict[int, float]:
        """log(corrected / plain), or over other cells by seed, of every seed that has both."""
        other = self.plain if against is None else against
        seeds = self.chosen.index.intersection(other.index)
        return {int(seed): math.log(self.chosen.loc[seed, value] / other.loc[seed, value]) for seed in seeds}


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
    """The most cells of which every seed has every strength, so that all seeds choose among the same."""
    if cells.empty:
        return cells
    seeds = {strength: set(part["seed"]) for strength, part in cells.groupby(STRENGTH)}
    grids = [grid for size in range(1, len(seeds) + 1) for grid in combinations(seeds, size)]
    whole = {grid: set.intersection(*(seeds[strength] for strength in grid)) for grid in grids}
    best = max(grids, key=lambda grid: (len(grid) * len(whole[grid]), len(grid)))
    return cells[cells[STRENGTH].isin(best) & cells["seed"].isin(whole[best])]


def _best_by_seed(cells: pd.DataFrame, minimise: str) -> pd.DataFrame:
    best = [pick(part, minimise) for _, part in cells.groupby("seed")] if len(cells) else []
    return pd.DataFrame([row for row in best if row is not None]).set_index("seed") if best else cells


Accuracy = Callable[[str, float, str, str | None], dict[int, float]]
"""Mean accuracy in percent by seed, for a pruner, sparsity, rule and label of the correction (None: the plain rule)."""


def accuracies(layout: DictConfig, cells: pd.DataFrame) -> Accuracy:
    """Look-up of the zero-shot cells that have run."""
    tasks = list(layout.zeroshot.tasks)
    some = cells.reindex(columns=tasks).notna().all(axis=1).any()
    measured = with_mean(layout.zeroshot, cells) if some else cells.iloc[:0]
    meaning = {str(row.label): dict(row["where"]) for row in layout.corrections}

    def look_up(pruner: str, sparsity: float, rule: str, label: str | None) -> dict[int, float]:
        conditions = {"pruner": pruner, "sparsity": sparsity, "allocator": rule if label is None else "absorption"}
        if label is not None:
            conditions |= {"allocator.inner": rule, STRENGTH: "auto", **meaning[label]}
        found = where(measured, conditions)
        return {} if found.empty else dict(zip(found["seed"], 100 * found[layout.zeroshot.value], strict=True))

    return look_up


def summary(layout: DictConfig, found: Sequence[Corrected], accuracy: Accuracy) -> pd.DataFrame:
    """Rows (pruner, sparsity, rule and correction): perplexity, change, chosen strengths, zero-shot and its change."""
    rows: dict[tuple[str, str], list[str]] = {}
    grid = {float(x) for item in found for x in item.every[STRENGTH]}
    for item in found:
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
    had = sorted({float(x) for x in item.every[STRENGTH]})
    return text if set(had) == grid else f"{text} of {', '.join(f'{x:g}' for x in had)}"


def against(layout: DictConfig, found: Sequence[Corrected]) -> pd.DataFrame:
    """The correction over each other one of the same rule, seed by seed: below zero it is the better one."""
    first, *others = (str(row.label) for row in layout.corrections)
    rows = {}
    for item in (x for x in found if x.label == first):
        same = {x.label: x for x in found if (_group(x), x.rule) == (_group(item), item.rule)}
        texts = [change(item.changes(layout.value, same[label].chosen)) if label in same else "" for label in others]
        if any(texts):
            rows[_group(item), item.rule] = texts
    index = pd.MultiIndex.from_tuples(list(rows), names=["pruner", "allocation"])
    return pd.DataFrame(list(rows.values()), index=index, columns=pd.MultiIndex.from_product([others, [""]]))


def averages(layout: DictConfig, found: Sequence[Corrected], accuracy: Accuracy) -> pd.DataFrame:
    """The change averaged over the paper's rules, where all of them have run, with the paper's average beside."""
    paper = paper_numbers(layout)
    first = [item for item in found if item.label == layout.corrections[0].label]
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
