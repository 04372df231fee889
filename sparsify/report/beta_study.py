"""What is worth knowing about beta: how fine a grid, how near the legal maximum, what choosing on the test brings."""

from __future__ import annotations

import pandas as pd
from omegaconf import DictConfig

from sparsify.allocators.arithmetic import legal_maximum
from sparsify.report.select import pick, where
from sparsify.report.table import format_number


def studied(layout: DictConfig, cells: pd.DataFrame) -> pd.DataFrame:
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
            found = where(curve, {"pruner": pruner, "sparsity": sparsity})
            if (found["beta"] > 0).any():
                rows.append(_row(found, layout, step))
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


def _row(found: pd.DataFrame, layout: DictConfig, step: float) -> list[str]:
    value = layout.value
    grids = [found[(found["beta"] / (factor * step)).round(6) % 1 == 0] for factor in layout.steps]
    honest, leaked = pick(found, "heldout"), pick(found, value)
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
