"""What training after or while pruning brings and costs: perplexity, accuracy, and a table of costs; its curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sparsify.report import frame
from sparsify.report.figures import COLOURS, cka_matrix, saved
from sparsify.report.layouts.base import Page
from sparsify.report.layouts.by_sparsity import BySparsity, values_of
from sparsify.report.numbers import format_number
from sparsify.report.select import where, with_stages
from sparsify.report.spread import Spread

BITS = "bits a weight"
"""The column that is shown only where something was quantised."""
COSTS = {
    "trainable": ("noted.trainable", "noted.recovery.trainable"),
    "tokens": ("noted.training_tokens", "noted.recovery.training_tokens"),
    "sparsity at the end": ("achieved",),
    "minutes": ("seconds.prune",),
    BITS: ("noted.bits_per_weight", "noted.quantiser.bits_per_weight"),
    "peak GiB": ("noted.peak_gib", "noted.recovery.peak_gib"),
}
"""Columns of the table of costs, and where in a wide row their number may stand."""


class Recovery(BySparsity):
    """Mean and interval over seeds by pruner, method and sparsity."""

    second = "method"

    def prepare(self, cells: pd.DataFrame) -> pd.DataFrame:
        """Names what was not done after pruning too."""
        return with_stages(cells)

    def write(self, page: Page) -> list[Path]:
        """A file of up to three tables, and figures: of a training by steps, and of the similarity of blocks."""
        more = self.accuracy(page.cells, lambda values: _spread(values, "{:.1f}".format))
        if not (costs := _costs(self, page.cells)).empty:
            more.append(("Costs, means over seeds", costs))
        files = page.write(self.frame(page.cells, self.value, _of_perplexity), more) + _figure(page)
        if similar := frame.similarities(page.cells):
            files += cka_matrix(page.figures, f"cka_{page.stem}", similar, page.title)
        return files


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
    if not index:
        return pd.DataFrame()
    names, columns = (
        pd.MultiIndex.from_tuples(index, names=["pruner", "method"]),
        pd.MultiIndex.from_product([[""], COSTS]),
    )
    costs = pd.DataFrame(rows, index=names, columns=columns)
    return costs if costs["", BITS].any() else costs.drop(columns=[("", BITS)])


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
    if name == BITS:
        return f"{mean:.2f}"
    return f"{mean:.1f}" if name == "peak GiB" else f"{mean:,.0f}"


def _figure(page: Page) -> list[Path]:
    """Of the first cell that was trained by steps: its loss, and the sparsity and rank of every block by step."""
    if "noted.step_ranks" not in page.cells or not page.cells["noted.step_ranks"].notna().any():
        return []
    cell = page.cells[page.cells["noted.step_ranks"].notna()].iloc[0]
    loss, by_step = _line(cell["noted.loss"]), _line(cell["noted.step_sparsity"])
    sparsity, ranks = _lines(cell["noted.step_block_sparsity"]), _lines(cell["noted.step_ranks"])
    with saved(page.figures, f"training_{page.stem}", 7.6, 2.6, 3, False, 1) as (panels, files):
        panels[0].plot(range(1, len(loss) + 1), loss, color=COLOURS[0])
        panels[0].set(xlabel="optimiser step", ylabel="loss (nats per token)")
        _by_block(panels[1], [[100 * s for s in row] for row in sparsity], [f"{s:.1%} zeros" for s in by_step])
        panels[1].set(xlabel="block", ylabel="zeros (%)")
        _by_block(panels[2], ranks, [f"mean {np.mean(row):.3g}" for row in ranks])
        panels[2].set(xlabel="block", ylabel="rank")
    return files


def _by_block(axes: Axes, lines: Sequence[Sequence[float]], remarks: Sequence[str]) -> None:
    """A line over the blocks for every step of the method."""
    for number, (line, remark) in enumerate(zip(lines, remarks, strict=True)):
        label = f"step {number + 1}, {remark}"
        axes.plot(range(1, len(line) + 1), line, color=COLOURS[number % len(COLOURS)], label=label)
    axes.legend(fontsize="small")


def _lines(text: object) -> list[list[float]]:
    return [_line(row) for row in str(text).split(";")]


def _line(text: object) -> list[float]:
    return [float(x) for x in str(text).split("|")]
