"""What is worth knowing about beta: how fine a grid, how near the legal maximum, what choosing on the test brings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from sparsify.allocators.arithmetic import legal_maximum
from sparsify.report.layouts.base import Layout, Page
from sparsify.report.numbers import format_number
from sparsify.report.select import pick, where


@dataclass(frozen=True, kw_only=True)
class BetaStudy(Layout):
    """Grid step, share of the legal maximum, and the worth of choosing beta on the test text.

    Attributes:
        pruners: groups of rows, in order.
        steps: grids, in units of the finest that has run.
    """

    pruners: list[str]
    steps: list[int]

    def write(self, page: Page) -> list[Path]:
        """A table."""
        return page.write(studied(self, page.cells))


def studied(layout: BetaStudy, cells: pd.DataFrame) -> pd.DataFrame:
    """One row per pruner and sparsity, from the cells of the beta curve; beta = 0 is the uniform allocation.

    Columns: best test perplexity on grids of `layout.steps` times the finest step, held-out choice of beta, its share
    of the legal maximum, the test perplexity it gives, and how much lower choosing on the test text itself would be.
    """
    curve = pd.concat([where(cells, {"allocator": "atp"}), where(cells, {"allocator": "uniform"})])
    curve = curve[curve["sparsity"] > 0].assign(beta=lambda frame: frame["allocator.beta"].fillna(0.0).astype(float))
    step = float(curve.loc[curve["beta"] > 0, "beta"].min())
    rows, index = [], []
    for pruner in [p for p in layout.pruners if p in set(curve["pruner"])]:
        for sparsity in sorted(set(curve["sparsity"])):
            here = where(curve, {"pruner": pruner, "sparsity": sparsity})
            if (here["beta"] > 0).any():
                rows.append(_row(here, layout, step))
                index.append((pruner, f"{sparsity:.0%}"))
    columns = [("grid of", f"{factor * step:g}") for factor in layout.steps]
    columns += [
        ("β by held-out", ""),
        ("of the maximum", ""),
        ("perplexity", "by held-out"),
        ("perplexity", "by test"),
        ("leak", ""),
    ]
    names = ["pruner", "sparsity"]
    frame = pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(index, names=names))
    frame.columns = pd.MultiIndex.from_tuples(columns)
    return frame


def _row(cells: pd.DataFrame, layout: BetaStudy, step: float) -> list[str]:
    value = layout.value
    grids = [cells[(cells["beta"] / (factor * step)).round(6) % 1 == 0] for factor in layout.steps]
    honest, leaked = pick(cells, "heldout"), pick(cells, value)
    assert honest is not None
    assert leaked is not None
    limit = legal_maximum(float(honest["sparsity"]), int(honest["num_blocks"]))
    return [
        *(format_number(float(grid[value].min())) for grid in grids),
        f"{honest['beta']:.3f}",
        f"{honest['beta'] / limit:.0%}",
        format_number(float(honest[value])),
        format_number(float(leaked[value])),
        f"{1 - float(leaked[value]) / float(honest[value]):.1%}",
    ]
