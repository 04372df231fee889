"""What training after or while pruning brings and costs: perplexity, accuracy, and a table of costs; its curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from sparsify.report.figures import COLOURS, saved
from sparsify.report.layouts.base import Page
from sparsify.report.layouts.by_sparsity import BySparsity, values_of
from sparsify.report.numbers import format_number
from sparsify.report.select import where
from sparsify.report.spread import Spread

COSTS = {
    "trainable": ("noted.trainable", "noted.recovery.trainable"),
    "tokens": ("noted.training_tokens", "noted.recovery.training_tokens"),
    "sparsity at the end": ("achieved",),
    "minutes": ("seconds.prune",),
    "peak GiB": ("noted.peak_gib", "noted.recovery.peak_gib"),
}
"""Columns of the table of costs, and where in a wide row their number may stand."""


class Recovery(BySparsity):
    """Mean and interval over seeds by pruner, method and sparsity."""

    second = "method"

    def prepare(self, cells: pd.DataFrame) -> pd.DataFrame:
        """Cells without a recovery are of recovery `none`, so that a row can ask for these."""
        have = cells["recovery"] if "recovery" in cells else pd.Series(pd.NA, index=cells.index)
        return cells.assign(recovery=have.fillna("none"))

    def write(self, page: Page) -> list[Path]:
        """A file of up to three tables, and a figure where something was trained by steps."""
        more = self.accuracy(page.cells, lambda values: _spread(values, "{:.1f}".format))
        if not (costs := _costs(self, page.cells)).empty:
            more.append(("Costs, means over seeds", costs))
        return page.write(self.frame(page.cells, self.value, _of_perplexity), more) + _figure(page)


def _of_perplexity(values: Sequence[float]) -> str:
    return _spread(values, format_number)


def _spread(values: Sequence[float], number: Callable[[float], str]) -> str:
    """`180 ± 12 (3)`; a single run is its number."""
    spread = Spread.of(values)
    return number(spread.mean) if spread.n < 2 else f"{number(spread.mean)} ± {number(spread.half)} ({spread.n})"


def _costs(layout: Recovery, cells: pd.DataFrame) -> pd.DataFrame:
    """What the rows took at the highest sparsity that they have."""
    rows, index = [], []
    for pruner, label, chosen in layout.entries(cells):
        highest = where(chosen, {"sparsity": chosen["sparsity"].max()})
        rows.append([_cost(name, highest) for name in COSTS])
        index.append((pruner, label))
    names = pd.MultiIndex.from_tuples(index, names=["pruner", "method"]) if index else None
    return pd.DataFrame(rows, index=names, columns=list(COSTS)) if index else pd.DataFrame()


def _cost(name: str, cells: pd.DataFrame) -> str:
    found = [values_of(cells, column) for column in COSTS[name]]
    values = next((numbers for numbers in found if numbers), [])
    if not values:
        return ""
    mean = float(np.mean(values))
    if name == "minutes":
        return f"{mean / 60:.1f}"
    if name == "sparsity at the end":
        return f"{mean:.1%}"
    return f"{mean:.1f}" if name == "peak GiB" else f"{mean:,.0f}"


def _figure(page: Page) -> list[Path]:
    """Loss and sparsity along the training of the first cell by steps, and the ranks of its blocks."""
    if "noted.step_ranks" not in page.cells or not page.cells["noted.step_ranks"].notna().any():
        return []
    cell = page.cells[page.cells["noted.step_ranks"].notna()].iloc[0]
    loss, sparsity = _line(cell["noted.loss"]), _line(cell["noted.step_sparsity"])
    ranks = [_line(row) for row in str(cell["noted.step_ranks"]).split(";")]
    name = f"training_{page.stem}"
    with saved(page.figures, name, 6.4, 2.6, 3, False, 1) as (panels, files):
        panels[0].plot(range(1, len(loss) + 1), loss, color=COLOURS[0])
        panels[0].set(xlabel="optimiser step", ylabel="loss (nats per token)")
        panels[1].step(range(1, len(sparsity) + 1), [100 * s for s in sparsity], where="mid", color=COLOURS[0])
        panels[1].set(xlabel="step of the method", ylabel="zeros (%)")
        for number, row in enumerate(ranks):
            panels[2].plot(
                range(1, len(row) + 1), row, color=COLOURS[number % len(COLOURS)], label=f"step {number + 1}"
            )
        panels[2].set(xlabel="block", ylabel="rank")
        panels[2].legend(fontsize="small")
    return files


def _line(text: object) -> list[float]:
    return [float(x) for x in str(text).split("|")]
