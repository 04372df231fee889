"""How a table of `configs/table` becomes files: one function for each value of its `layout`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from sparsify.report import (
    absorption,
    accuracy,
    beta_study,
    compare,
    correction,
    correction_figures,
    curves,
    figures,
    frame,
    search,
    seeds,
    table,
    write,
)
from sparsify.runs import registry


def table_config(name: str) -> DictConfig:
    """The layout of a table: its parts, rows, columns and figures."""
    config = OmegaConf.load(registry.find("table", name))
    assert isinstance(config, DictConfig)
    return config


@dataclass(frozen=True)
class Page:
    """A table about to be written, with everything that its layout may need.

    Attributes:
        layout: its file of `configs/table`.
        cells: wide rows, one per finished cell.
        rows: long rows, as they are published.
        name: of the table.
        stem: model and scale, the rest of every file's name.
        title: heading.
        notes: footnotes.
        tables: folder for tables.
        figures: folder for figures.
    """

    layout: DictConfig
    cells: pd.DataFrame
    rows: pd.DataFrame
    name: str
    stem: str
    title: str
    notes: list[str]
    tables: Path
    figures: Path

    def write(self, shown: pd.DataFrame, more: Sequence[tuple[str, pd.DataFrame]] = ()) -> list[Path]:
        """Markdown, CSV and LaTeX."""
        return write.write(self.tables, f"{self.name}_{self.stem}", shown, self.rows, self.title, self.notes, more)

    def pruners(self) -> list[str]:
        """Pruners of the sparse cells: the layout's in its order, then any other."""
        present = set(self.cells.loc[self.cells["sparsity"] > 0, "pruner"])
        listed = [p for p in self.layout.pruners if p in present]
        return listed + [p for p in registry.names("pruner") if p in present and p not in listed]

    def entries(self) -> list[table.Entry]:
        """Every number of a table of rows by sparsity."""
        sparsities = sorted(s for s in self.cells["sparsity"].unique() if s)
        return table.entries(self.layout, self.cells, self.pruners(), sparsities)


def perplexities(page: Page) -> list[Path]:
    """Rows by sparsity with the papers' numbers beside, a dot plot, and the figures that the layout names."""
    layout, cells, found = page.layout, page.cells, page.entries()
    paper = table.paper_numbers(layout)
    protocol = str(cells[f"{layout.value}.protocol"].iloc[0])
    files = page.write(table.grid_frame(found, paper, _paper_models(layout, paper, str(cells["model"].iloc[0]))))
    files += figures.dot_plot(page.tables, f"{page.name}_{page.stem}", found, page.title, protocol)
    if "beta_curve" in layout.figures and (cells["allocator"] == "atp").any():
        files += figures.beta_curve(page.figures, f"beta_curve_{page.stem}", cells, layout.value, protocol)
    for name in (f for f in layout.figures if f.startswith("layer_profile") and page.pruners()):
        files += figures.layer_profile(page.figures, f"{name}_{page.stem}", found, frame.profiles(cells))
    return files


def _paper_models(layout: DictConfig, paper: pd.DataFrame, model: str) -> list[str]:
    """The paper columns: this very model's if the papers have it, else those the layout shows for orientation."""
    return [model] if model in set(paper["model"]) else list(layout.paper_models)


def comparison(page: Page) -> list[Path]:
    """Another implementation's numbers beside ours."""
    return page.write(compare.compared(page.layout, page.cells))


def by_block(page: Page) -> list[Path]:
    """Curves over depth."""
    found = curves.lines(page.layout, page.cells)
    files = page.write(curves.summary(page.layout, found))
    return files + curves.figure(page.figures, f"{page.name}_{page.stem}", page.layout, found, page.title)


def searches(page: Page) -> list[Path]:
    """What searches cost and bring."""
    runs, protocol = search.runs_of(page.layout, page.cells), str(page.cells["heldout.protocol"].iloc[0])
    files = page.write(search.summary(page.layout, runs))
    return files + search.figure(page.figures, f"search_{page.stem}", page.layout, runs, protocol)


def over_seeds(page: Page) -> list[Path]:
    """Means and intervals."""
    return page.write(seeds.over_seeds(page.layout, page.cells))


def accuracies(page: Page) -> list[Path]:
    """Mean accuracy over tasks, then every task."""
    found = page.entries()
    by_task = f"{page.title}, by task", accuracy.task_frame(page.layout, found, page.cells)
    return page.write(accuracy.mean_frame(page.layout, found, page.cells), [by_task])


def beta_studied(page: Page) -> list[Path]:
    """Grid step, share of the maximum, leak."""
    return page.write(beta_study.studied(page.layout, page.cells))


def absorbed(page: Page) -> list[Path]:
    """Coefficients by third of the depth, drifts, and r by block and scale."""
    found = absorption.disturbances(page.layout, page.cells)
    files = page.write(absorption.summary(found))
    files += absorption.drift_figure(page.figures, f"drift_{page.stem}", page.layout, found, page.title)
    return files + absorption.coefficient_figure(
        page.figures, f"absorption_{page.stem}", page.layout, found, page.title
    )


def corrected(page: Page) -> list[Path]:
    """Every rule plain, corrected and with controls; the correction over the controls; the paper's averages."""
    layout, found = page.layout, correction.corrections(page.layout, page.cells)
    accuracy_of = correction.accuracies(layout, page.cells)
    more = [(f"{page.title}: the paper's averages", correction.averages(layout, found, accuracy_of))]
    if len(rivals := correction.against(layout, found)):
        more.insert(0, (f"{page.title}: corrected over the others, below zero it is the better one", rivals))
    files = page.write(correction.summary(layout, found, accuracy_of), more)
    protocol = str(page.cells[f"{layout.value}.protocol"].iloc[0])
    strength, profile = (f"{kind}_{page.name}_{page.stem}" for kind in ("strength", "layer_profile"))
    files += correction_figures.strength_figure(page.figures, strength, layout, found, page.title, protocol)
    return files + correction_figures.profile_figure(page.figures, profile, layout, found, page.title)


LAYOUTS: dict[str, Callable[[Page], list[Path]]] = {
    "perplexities": perplexities,
    "compare": comparison,
    "curves": by_block,
    "search": searches,
    "seeds": over_seeds,
    "accuracy": accuracies,
    "beta_study": beta_studied,
    "absorption": absorbed,
    "correction": corrected,
}
"""By the `layout` of a table's config; perplexities where it names none."""
