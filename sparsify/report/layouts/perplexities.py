"""Perplexity by row and sparsity with the papers' numbers beside, a dot plot, and figures that the file names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from sparsify.errors import UsageError
from sparsify.report import frame
from sparsify.report.figures import cka_matrix
from sparsify.report.layouts.base import Page
from sparsify.report.layouts.entries import Entries, grid_frame
from sparsify.report.layouts.perplexity_figures import beta_curve, dot_plot, layer_profile
from sparsify.report.numbers import paper_numbers


@dataclass(frozen=True, kw_only=True)
class Perplexities(Entries):
    """Rows by sparsity.

    Attributes:
        paper_models: models whose numbers in the papers are shown for orientation, where they have none for ours.
        figures: `beta_curve`, and files of sparsity by block, whose names start with `layer_profile`.
    """

    paper_models: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in self.figures:
            if name != "beta_curve" and not name.startswith("layer_profile"):
                raise UsageError("No figure of that name", got=name, allowed="beta_curve, layer_profile...")

    def write(self, page: Page) -> list[Path]:
        """A table and its figures; that of CKA wherever a cell was allocated by it."""
        cells, entries, paper = page.cells, self.entries(page.cells), paper_numbers(self.paper)
        protocol = str(cells[f"{self.value}.protocol"].iloc[0])
        files = page.write(grid_frame(entries, paper, self._paper_models(paper, str(cells["model"].iloc[0]))))
        files += dot_plot(page.tables, f"{page.name}_{page.stem}", entries, page.title, protocol)
        if "beta_curve" in self.figures and (cells["allocator"] == "atp").any():
            files += beta_curve(page.figures, f"beta_curve_{page.stem}", cells, self.value, protocol)
        if similar := frame.similarities(cells):
            files += cka_matrix(page.figures, f"cka_{page.stem}", similar, page.title)
        for name in (f for f in self.figures if f.startswith("layer_profile") and any(e.pruner for e in entries)):
            files += layer_profile(page.figures, f"{name}_{page.stem}", entries, frame.profiles(cells))
        return files

    def _paper_models(self, paper: pd.DataFrame, model: str) -> list[str]:
        return [model] if model in set(paper["model"]) else self.paper_models
