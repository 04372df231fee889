"""What every layout of a table has, and the page that it writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from sparsify.report import write


@dataclass(frozen=True)
class Page:
    """A table about to be written.

    Attributes:
        cells: wide rows, one per finished cell.
        rows: long rows, as they are published.
        name: of the table.
        stem: model and scale, the rest of every file's name.
        title: heading.
        notes: footnotes.
        tables: folder for tables.
        figures: folder for figures.
    """

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


@dataclass(frozen=True, kw_only=True)
class Layout(ABC):
    """A file of `configs/table`: each kind of layout is a subclass, whose fields are the keys that the file may have.

    Attributes:
        title: heading of the table.
        layout: the kind, a key of `layouts.LAYOUTS`.
        parts: the sweeps that make the cells, each a list of overrides.
        value: the evaluation that is shown.
        notes: footnotes.
    """

    title: str
    layout: str
    parts: list[list[str]]
    value: str = "test"
    notes: list[str] = field(default_factory=list)

    def prepare(self, cells: pd.DataFrame) -> pd.DataFrame:
        """The cells that the table is made from, with what it derives from their measurements."""
        return cells

    @abstractmethod
    def write(self, page: Page) -> list[Path]:
        """Write the table and its figures; returns the files, the Markdown first."""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        label: as printed.
        where: columns of the wide rows and what they must be.
        minimise: the evaluation that chooses among several such cells; without it there must be one.
        show: a column whose value is printed beside the number.
        paper: name of the allocator in the CSV of the papers' numbers.
        dense: the row of the dense model.
        under: the pruner whose rows it stands among; empty for that of `where`, or every one.
    """

    label: str
    where: dict[str, Any] = field(default_factory=dict)
    minimise: str | None = None
    show: str | None = None
    paper: str = ""
    dense: bool = False
    under: str = ""
