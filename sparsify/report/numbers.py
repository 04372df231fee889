"""Numbers as they are printed, and the papers' own."""

from __future__ import annotations

import pandas as pd

from sparsify import paths


def format_number(value: float) -> str:
    """Two decimals below 100, one below 1000, none below 100,000, scientific above: as the papers print them."""
    if value < 100:
        return f"{value:.2f}"
    if value < 1000:
        return f"{value:.1f}"
    return f"{value:.0f}" if value < 1e5 else f"{value:.1e}"


def paper_numbers(file: str) -> pd.DataFrame:
    """The papers' numbers of a table, each with its source; the file is given from the root of the project.

    Columns: model, pruner, allocator, sparsity, protocol, value, source.
    """
    return pd.read_csv(paths.root() / file).fillna({"pruner": ""})
