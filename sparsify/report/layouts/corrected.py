"""The cells of a correction: for every rule the plain ones, and for every seed the best strength of each correction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import pandas as pd

from sparsify.report.select import pick, where

if TYPE_CHECKING:
    from sparsify.report.layouts.correction import Corrections

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
        compared: cells of all strengths that the best was chosen among: the same strengths for every seed, so that none
            chooses among more than another.
    """

    pruner: str
    sparsity: float
    rule: str
    allocator: str
    label: str
    plain: pd.DataFrame
    chosen: pd.DataFrame
    compared: pd.DataFrame

    def changes(self, value: str, against: pd.DataFrame | None = None) -> dict[int, float]:
        """log(corrected / plain), or over other cells by seed, of every seed that has both."""
        other = self.plain if against is None else against
        seeds = self.chosen.index.intersection(other.index)
        return {int(seed): math.log(self.chosen.loc[seed, value] / other.loc[seed, value]) for seed in seeds}


def corrections(layout: Corrections, cells: pd.DataFrame) -> list[Corrected]:
    """Every rule and correction of the layout that has run, in reading order."""
    corrected = []
    cells = cells[~_searched(cells) & cells[[layout.value, layout.minimise]].notna().all(axis=1)]
    for pruner in layout.pruners:
        for sparsity in sorted(s for s in cells["sparsity"].unique() if s):
            here = where(cells, {"pruner": pruner, "sparsity": sparsity})
            for rule in layout.rules:
                plain = where(here, {"allocator": rule.allocator}).set_index("seed")
                for item in layout.corrections:
                    inner = {"allocator": "absorption", "allocator.inner": rule.allocator}
                    compared = _comparable(where(here, {**inner, **item.where}))
                    chosen = _best_by_seed(compared, layout.minimise)
                    row = (pruner, float(sparsity), rule.label, rule.allocator, item.label, plain, chosen, compared)
                    corrected += [Corrected(*row)] if len(chosen) else []
    return corrected


def _searched(cells: pd.DataFrame) -> pd.Series:
    """Cells that searched their strength themselves: they are for the zero-shot columns."""
    strength = cells[STRENGTH] if STRENGTH in cells else pd.Series("", index=cells.index)
    return strength == "auto"


def _comparable(cells: pd.DataFrame) -> pd.DataFrame:
    """Drop seeds and strengths until each seed that is left has each strength, and as many cells as can be are left."""
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
