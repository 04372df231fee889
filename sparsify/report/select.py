"""Queries over cells: which ones belong to a table row, and which of several is the chosen one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd


def where(cells: pd.DataFrame, conditions: Mapping[str, Any]) -> pd.DataFrame:
    """The cells whose columns equal the conditions (floats to 1e-9; a missing column matches nothing)."""
    chosen = pd.Series(True, index=cells.index)
    for column, value in conditions.items():
        if column not in cells:
            return cells.iloc[:0]
        chosen &= cells[column].map(lambda have, want=value: _equal(have, want)).astype(bool)
    return cells[chosen]


def _equal(have: Any, want: Any) -> bool:
    if isinstance(want, bool) or isinstance(have, bool):
        return have is want
    if isinstance(want, int | float) and isinstance(have, int | float):
        return math.isclose(have, want, abs_tol=1e-9)
    return bool(have == want)


def with_stages(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells without a recovery or quantiser are of `none`, so that a row can ask for these."""
    nothing = pd.Series(pd.NA, index=cells.index)
    return cells.assign(**{stage: cells.get(stage, nothing).fillna("none") for stage in ("recovery", "quantiser")})


def pick(cells: pd.DataFrame, minimise: str | None) -> pd.Series | None:
    """The one cell of a table entry: the lowest in `minimise`, or the only one; None if there is none.

    Raises:
        ValueError: several cells and no rule to choose by.
    """
    if cells.empty:
        return None
    if minimise is None:
        if len(cells) > 1:
            raise ValueError(f"{len(cells)} cells for one table entry and no selection rule: {list(cells['key'])}")
        return cells.iloc[0]
    if minimise not in cells or cells[minimise].isna().all():
        return None
    return cells.iloc[int(cells[minimise].argmin())]
