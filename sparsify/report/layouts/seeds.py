"""A table over seeds: one row per allocation, one column per calibration text, mean and interval in each entry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from sparsify.report.layouts.base import Layout, Page, Row
from sparsify.report.select import where
from sparsify.report.spread import Spread


@dataclass(frozen=True, kw_only=True)
class Seeds(Layout):
    """Means and intervals over seeds.

    Attributes:
        rows: allocations.
    """

    rows: list[Row]

    def write(self, page: Page) -> list[Path]:
        """A table."""
        return page.write(over_seeds(self, page.cells))


def over_seeds(layout: Seeds, cells: pd.DataFrame) -> pd.DataFrame:
    """Rows (sparsity, allocation), columns by calibration text: `mean ± half of the 95% interval (runs)`."""
    texts = list(dict.fromkeys(cells["calibration"].map(text_of)))
    rows, index = [], []
    for sparsity in sorted(set(cells["sparsity"])):
        for row in layout.rows:
            here = where(cells, {**row.where, "sparsity": sparsity})
            if not here.empty:
                rows.append([_entry(here[here["calibration"].map(text_of) == text], layout.value) for text in texts])
                index.append((f"{sparsity:.0%}", str(row.label)))
    columns = pd.MultiIndex.from_tuples([("calibrated on", text) for text in texts])
    return pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(index, names=["sparsity", "allocation"]), columns=columns)


def text_of(calibration: str) -> str:
    """`c4` of `c4 train (random sampler), 128 x 2048 tokens`."""
    return calibration.split(" ", 1)[0]


def _entry(cells: pd.DataFrame, value: str) -> str:
    return "" if cells.empty else str(Spread.of(list(cells[value])))
