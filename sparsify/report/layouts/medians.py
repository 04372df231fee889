"""Medians over seeds, where perplexities are too wild for means: perplexity, its logarithm, accuracy, searches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparsify.report import frame
from sparsify.report.layouts import search
from sparsify.report.layouts.base import Page
from sparsify.report.layouts.by_sparsity import BySparsity
from sparsify.report.layouts.entries import Entry
from sparsify.report.layouts.perplexity_figures import layer_profile
from sparsify.report.select import where
from sparsify.report.spread import median_and_range


@dataclass(frozen=True, kw_only=True)
class Medians(BySparsity):
    """Median and range over seeds by row and sparsity.

    Attributes:
        beside: other evaluations, each with the title of a table of its own.
    """

    beside: dict[str, str] = field(default_factory=dict)

    def write(self, page: Page) -> list[Path]:
        """A file of up to three tables, the search curves and the sparsity of every block."""
        cells = page.cells
        logs = self.frame(
            cells, self.value, lambda values: median_and_range([math.log(x) for x in values], "{:.3f}".format)
        )
        more = [("Log-perplexity (nats per token)", logs)]
        more += [(title, self.frame(cells, name, median_and_range)) for name, title in self.beside.items()]
        more += self.accuracy(cells, lambda values: median_and_range(values, "{:.1f}".format))
        files = page.write(self.frame(cells, self.value, median_and_range), more)
        return files + self._figures(page)

    def _figures(self, page: Page) -> list[Path]:
        """Of the first pruner and the first seed."""
        cells = where(page.cells, {"seed": page.cells["seed"].min()})
        cells = cells[cells["pruner"].eq(self.present(cells)[0]) & (cells["sparsity"] > 0)]
        runs = search.runs_of(self, cells)
        files = layer_profile(page.figures, f"levels_{page.stem}", _entries(runs, self.value), frame.profiles(cells))
        if any(len(run.heldout) for run in runs):
            protocol = str(page.cells["heldout.protocol"].dropna().iloc[0])
            files += search.figure(page.figures, f"search_curves_{page.stem}", self, runs, protocol)
        return files


def _entries(runs: Sequence[search.Run], value: str) -> list[Entry]:
    return [Entry(r.cell["pruner"], r.label, r.sparsity, float(r.cell[value]), "", r.cell["key"], "") for r in runs]
