"""A table over seeds: one row per allocation, one column per calibration text, mean and interval in each entry."""

from __future__ import annotations

import pandas as pd
from omegaconf import DictConfig

from sparsify.report.select import where
from sparsify.report.spread import Spread


def over_seeds(layout: DictConfig, cells: pd.DataFrame) -> pd.DataFrame:
    """Rows (sparsity, allocation), columns by calibration text: `mean ± half of the 95% interval (runs)`."""
    texts = list(dict.fromkeys(cells["calibration"].map(text_of)))
    rows, index = [], []
    for sparsity in sorted(set(cells["sparsity"])):
        for row in layout.rows:
            found = where(cells, {**row.where, "sparsity": sparsity})
            if not found.empty:
                rows.append([_entry(found[found["calibration"].map(text_of) == text], layout.value) for text in texts])
                index.append((f"{sparsity:.0%}", str(row.label)))
    columns = pd.MultiIndex.from_tuples([("calibrated on", text) for text in texts])
    return pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(index, names=["sparsity", "allocation"]), columns=columns)


def text_of(calibration: str) -> str:
    """`c4` of `c4 train (random sampler), 128 x 2048 tokens`."""
    return calibration.split(" ", 1)[0]


def _entry(found: pd.DataFrame, value: str) -> str:
    return "" if found.empty else str(Spread.of(list(found[value])))
