"""Our number beside another implementation's, setting by setting, with the deviation and its tolerance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from sparsify.report.layouts.base import Layout, Page
from sparsify.report.numbers import format_number, paper_numbers
from sparsify.report.select import pick, where


@dataclass(frozen=True)
class Step:
    """A tolerance.

    Attributes:
        within: largest relative deviation.
        below: perplexities it is for; None for all that are left.
    """

    within: float
    below: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison(Layout):
    """Another implementation's numbers beside ours.

    Attributes:
        paper: CSV of the other's numbers.
        tolerance: steps, from the lowest perplexity up.
    """

    paper: str
    tolerance: list[Step]

    def write(self, page: Page) -> list[Path]:
        """A table."""
        return page.write(compared(self, page.cells))


def compared(layout: Comparison, cells: pd.DataFrame) -> pd.DataFrame:
    """One row per reference number: setting, theirs, ours, deviation, whether within tolerance.

    Every column of the reference CSV but `value` is a condition that our cell must meet; blanks are no condition.
    """
    reference = paper_numbers(layout.paper)
    keys = [column for column in reference.columns if column != "value"]
    rows, index = [], []
    for _, line in reference.iterrows():
        conditions = {key: line[key] for key in keys if pd.notna(line[key])}
        cell = pick(where(cells, conditions), None)
        ours = None if cell is None else float(cell[layout.value])
        index.append((str(line["pruner"]) if line["sparsity"] else "", _setting(conditions)))
        rows.append(_row(float(line["value"]), ours, layout))
    columns = pd.MultiIndex.from_tuples([("released", "code"), ("ours", ""), ("deviation", ""), ("within", "")])
    return pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(index, names=["pruner", "allocation"]), columns=columns)


def _setting(conditions: dict[str, object]) -> str:
    if not conditions["sparsity"]:
        return "dense"
    knobs = [f"{k.rpartition('.')[2]}={v}" for k, v in conditions.items() if "." in k]
    pattern = "" if conditions["pattern"] == "unstructured" else f", {conditions['pattern']}"
    return f"{conditions['allocator']} {float(str(conditions['sparsity'])):.0%}{pattern} {' '.join(knobs)}".strip()


def _row(theirs: float, ours: float | None, layout: Comparison) -> list[str]:
    if ours is None:
        return [format_number(theirs), "–", "", ""]
    deviation = ours / theirs - 1
    limit = tolerance(theirs, layout)
    return [
        format_number(theirs),
        format_number(ours),
        f"{deviation:+.1%}",
        f"{limit:.0%}: {'yes' if abs(deviation) <= limit else 'NO'}",
    ]


def tolerance(value: float, layout: Comparison) -> float:
    """Relative tolerance for a perplexity of this size: the first step of the layout that it is below."""
    return next(step.within for step in layout.tolerance if step.below is None or value < step.below)
