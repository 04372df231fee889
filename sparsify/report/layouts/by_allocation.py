"""Tables of ways of pruning by allocation: perplexity, what each allocation changes against the first, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparsify.report import figures
from sparsify.report.layouts.base import Layout, Page
from sparsify.report.layouts.by_sparsity import Show, with_accuracy
from sparsify.report.numbers import format_number
from sparsify.report.select import where, with_stages
from sparsify.report.spread import median_and_range

MARKERS = "os^Dv<>Ph*"
"""By allocation: there are more of them than colours."""


@dataclass(frozen=True)
class Pruning:
    """A row: what an allocation is used for.

    Attributes:
        label: as printed.
        where: columns of the wide rows and what they must be.
        group: of rows, printed once.
        by: the column that has the allocation's name; the allocator of bits, say.
    """

    label: str
    where: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    by: str = "allocator"


@dataclass(frozen=True, kw_only=True)
class ByAllocation(Layout):
    """Rows of ways of pruning, columns of allocations; medians over seeds.

    Attributes:
        allocations: config names of allocators by heading, in order; the others are held against the first.
        rows: ways of pruning; the dense model is one under the first allocation.
        tasks: whose mean accuracy makes a table of its own, where it was measured.
    """

    allocations: dict[str, str]
    rows: list[Pruning]
    tasks: list[str] = field(default_factory=list)

    def prepare(self, cells: pd.DataFrame) -> pd.DataFrame:
        """Names what was not done after pruning too."""
        return with_stages(cells)

    def write(self, page: Page) -> list[Path]:
        """A file of up to four tables, and a figure."""
        cells, first = page.cells, next(iter(self.allocations))
        more = [(f"Change of perplexity against {first}, in pairs by seed", self.changes(cells))]
        if cells["seed"].nunique() > 1:
            more.append(("Perplexity [lowest to highest] (seeds)", self.frame(cells, self.value, median_and_range)))
        title, measured = with_accuracy(cells, self.tasks)
        if title:
            more.append((title, self.frame(measured, "accuracy", _accuracy)))
        files = page.write(self.frame(cells, self.value, _median), [table for table in more if not table[1].empty])
        return files + self._figure(page)

    def by_seed(self, cells: pd.DataFrame, row: Pruning, label: str, value: str) -> pd.Series:
        """What the runs of an entry measured, by seed.

        Raises:
            ValueError: several of one seed.
        """
        chosen = where(cells, {**row.where, row.by: self.allocations[label]})
        if not chosen["seed"].is_unique:
            raise ValueError(f"Several cells of one seed for {row.label}, {label}: {list(chosen['key'])}")
        return chosen.set_index("seed").get(value, pd.Series(dtype=float)).dropna()

    def frame(self, cells: pd.DataFrame, value: str, show: Show) -> pd.DataFrame:
        """An entry for every row and allocation, a blank for what was not measured; none where nothing was."""
        return self._entries(list(self.allocations), lambda row, label: self.by_seed(cells, row, label, value), show)

    def changes(self, cells: pd.DataFrame) -> pd.DataFrame:
        """What every allocation changes against the first, the seeds that both have in pairs."""
        first, *others = self.allocations

        def ratios(row: Pruning, label: str) -> pd.Series:
            ours, theirs = (self.by_seed(cells, row, name, self.value) for name in (label, first))
            return (ours / theirs - 1).dropna()

        return self._entries(others, ratios, lambda values: median_and_range(values, "{:+.0%}".format))

    def _entries(self, labels: list[str], values: Callable[[Pruning, str], pd.Series], show: Show) -> pd.DataFrame:
        found = {(row.group, row.label): [values(row, label) for label in labels] for row in self.rows}
        shown = {row: [show(list(e)) if len(e) else "" for e in entries] for row, entries in found.items()}
        index = pd.MultiIndex.from_tuples(shown, names=["", "pruning"])
        frame = pd.DataFrame(
            list(shown.values()), index=index, columns=pd.MultiIndex.from_product([[""], labels]), dtype=str
        )
        return frame.loc[(frame != "").any(axis=1), (frame != "").any()]

    def _figure(self, page: Page) -> list[Path]:
        """Medians on a log axis, a line for every row and a colour for every allocation."""
        numbers = self.frame(page.cells, self.value, lambda values: str(np.median(values)))
        rows = [": ".join(filter(None, row)) for row in numbers.index]
        name = f"allocations_{page.name}_{page.stem}"
        with figures.saved(page.figures, name, 7.2, 0.9 + 0.24 * len(rows), 1) as ((axes,), files):
            for label, colour, marker in zip(self.allocations, cycle(figures.COLOURS), MARKERS, strict=False):
                if ("", label) in numbers:
                    values = pd.to_numeric(numbers["", label])
                    axes.plot(values, range(len(rows)), marker, color=colour, label=label)
            figures.log_axis(axes, "x")
            axes.set(title=page.title, xlabel=f"perplexity ({page.cells[f'{self.value}.protocol'].iloc[0]})")
            axes.set_yticks(range(len(rows)), rows)
            axes.invert_yaxis()
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return files


def _median(values: Sequence[float]) -> str:
    return format_number(float(np.median(values)))


def _accuracy(values: Sequence[float]) -> str:
    return f"{np.median(values):.1f}"
