"""What searching for sparsities costs and brings: a table, and the best so far against trials and against seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from sparsify.report.figures import COLOURS, log_axis, saved
from sparsify.report.layouts.base import Layout, Page, Row
from sparsify.report.numbers import format_number
from sparsify.report.select import pick, where

TRIALS = ("heldout", "seconds", "evaluations")


@runtime_checkable
class WithRows(Protocol):
    """A layout that says which cells its rows are."""

    @property
    def rows(self) -> list[Row]: ...


@dataclass(frozen=True, kw_only=True)
class Searches(Layout):
    """What searches cost and bring.

    Attributes:
        rows: searches, and rules without search.
        reference: label of the row whose trials and seconds the others are held to.
    """

    rows: list[Row]
    reference: str

    def write(self, page: Page) -> list[Path]:
        """A table and a figure."""
        runs, protocol = runs_of(self, page.cells), str(page.cells["heldout.protocol"].iloc[0])
        files = page.write(summary(self, runs))
        return files + figure(page.figures, f"search_{page.stem}", self, runs, protocol)


@dataclass(frozen=True)
class Run:
    """One search at one sparsity.

    Attributes:
        label: row of the table.
        sparsity: wanted zeros.
        cell: its wide row.
        heldout: held-out perplexity of every trial, in order; empty for a rule without search.
        seconds: when each trial ended, since the search began.
        evaluations: how many candidates had been measured by then.
    """

    label: str
    sparsity: float
    cell: pd.Series
    heldout: Float[ndarray, " trials"]
    seconds: Float[ndarray, " trials"]
    evaluations: Float[ndarray, " trials"]

    @property
    def best_so_far(self) -> Float[ndarray, " trials"]:
        return np.minimum.accumulate(self.heldout)

    def after_trials(self, count: int) -> float | None:
        """Best held-out perplexity of the first `count` trials."""
        return float(self.best_so_far[min(count, len(self.heldout)) - 1]) if len(self.heldout) else None

    def after_seconds(self, limit: float) -> float | None:
        """Best held-out perplexity of the trials that had ended by then."""
        done = int((self.seconds <= limit).sum())
        return float(self.best_so_far[done - 1]) if done else None


def runs_of(layout: WithRows, cells: pd.DataFrame) -> list[Run]:
    """Every row of the layout at every sparsity, where it has run."""
    runs = []
    for sparsity in sorted(set(cells.loc[cells["sparsity"] > 0, "sparsity"])):
        for row in (row for row in layout.rows if not row.dense):
            cell = pick(where(cells, {**row.where, "sparsity": sparsity}), row.minimise)
            if cell is not None:
                heldout, seconds, counts = (_numbers(cell.get(f"trials.{name}")) for name in TRIALS)
                evaluations = counts if len(counts) else np.arange(1.0, len(heldout) + 1)
                runs.append(Run(str(row.label), float(sparsity), cell, heldout, seconds, evaluations))
    return runs


def _numbers(text: object) -> Float[ndarray, " n"]:
    return np.array([float(x) for x in text.split("|")] if isinstance(text, str) else [])


def summary(layout: Searches, runs: list[Run]) -> pd.DataFrame:
    """Trials and seconds spent, the best trial at equal trials and equal seconds, and the chosen plan in full."""
    rows, index = [], []
    for run in runs:
        same = [r for r in runs if r.sparsity == run.sparsity]
        reference = next((r for r in same if r.label == layout.reference), None)
        best = min(float(r.cell[layout.value]) for r in same)
        rows.append(_row(run, reference, layout, best))
        index.append((f"{run.sparsity:.0%}", run.label))
    columns = [
        ("trials", ""),
        ("seconds", ""),
        ("held-out, equal trials", ""),
        ("held-out, equal seconds", ""),
        ("rank", "correlation"),
        ("in full", "held-out"),
        ("in full", "test"),
        ("above the best", ""),
    ]
    frame = pd.MultiIndex.from_tuples(columns)
    return pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(index, names=["sparsity", "search"]), columns=frame)


def _row(run: Run, reference: Run | None, layout: Searches, best: float) -> list[str]:
    trials = len(run.heldout)
    equal: list[float | None] = [None, None]
    if reference is not None and trials:
        equal = [run.after_trials(len(reference.heldout)), run.after_seconds(float(reference.seconds[-1]))]
    test = float(run.cell[layout.value])
    agreement = run.cell.get("noted.rank_correlation")
    return [
        str(trials) if trials else "",
        f"{run.seconds[-1]:.0f}" if trials else "",
        *("" if value is None else format_number(value) for value in equal),
        "" if agreement is None or math.isnan(agreement) else f"{agreement:.2f}",
        format_number(float(run.cell["heldout"])),
        format_number(test),
        f"{test / best - 1:+.0%}",
    ]


def figure(folder: Path, name: str, layout: WithRows, runs: list[Run], protocol: str) -> list[Path]:
    """Best held-out perplexity so far, against trials and against seconds, one row of panels per sparsity."""
    sparsities = sorted({run.sparsity for run in runs if len(run.heldout)})
    searched = {run.label for run in runs if len(run.heldout)}
    labels = [str(row.label) for row in layout.rows if row.label in searched]
    with saved(folder, name, 6.4, 0.3 + 2.2 * len(sparsities), 2 * len(sparsities), False, len(sparsities)) as (
        panels,
        files,
    ):
        for i, sparsity in enumerate(sparsities):
            for axes, what in zip(panels[2 * i : 2 * i + 2], ("evaluations", "seconds"), strict=True):
                for run in runs:
                    if run.sparsity == sparsity and len(run.heldout):
                        _line(axes, run, what, labels.index(run.label))
                log_axis(axes, "x")
                log_axis(axes, "y")
                axes.set(xlabel=what, title=f"{100 * sparsity:g}%")
            panels[2 * i].set_ylabel(f"best held-out perplexity so far\n({protocol})")
        lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
        panels[1].legend([lines[label] for label in labels], labels, loc="center left", bbox_to_anchor=(1, 0.5))
    return files


def _line(axes: object, run: Run, what: str, number: int) -> None:
    x = run.evaluations if what == "evaluations" else run.seconds
    finite = np.isfinite(run.best_so_far)
    dashed = "--" if number >= len(COLOURS) else "-"
    colour = COLOURS[number % len(COLOURS)]
    axes.step(x[finite], run.best_so_far[finite], dashed, where="post", color=colour, label=run.label)  # type: ignore[attr-defined]
    chosen = float(run.cell["heldout"])
    if math.isfinite(chosen):
        axes.plot(x[-1], chosen, "o", color=colour)  # type: ignore[attr-defined]
