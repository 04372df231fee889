"""Our number beside another implementation's, setting by setting, with the deviation and its tolerance."""

from __future__ import annotations

import pandas as pd
from omegaconf import DictConfig

from sparsify.report.select import pick, where
from sparsify.report.table import format_number, paper_numbers


def compared(layout: DictConfig, cells: pd.DataFrame) -> pd.DataFrame:
    """One row per reference number: setting, theirs, ours, deviation, whether within tolerance.

    Every column of the reference CSV but `value` is a condition that our cell must meet; blanks are no condition.
    """
    reference = paper_numbers(layout)
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


def _row(theirs: float, ours: float | None, layout: DictConfig) -> list[str]:
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


def tolerance(value: float, layout: DictConfig) -> float:
    """Relative tolerance for a perplexity of this size: the first step of the layout that it is below."""
    return next(float(step.within) for step in layout.tolerance if step.below is None or value < step.below)
