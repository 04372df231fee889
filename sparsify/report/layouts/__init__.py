"""How a table of `configs/table` becomes files: one kind of layout per module, its keys checked when it is loaded."""

from __future__ import annotations

from pathlib import Path

from sparsify import schema
from sparsify.errors import UsageError
from sparsify.report.layouts.absorption import Absorption
from sparsify.report.layouts.accuracy import Accuracies
from sparsify.report.layouts.base import Layout
from sparsify.report.layouts.beta_study import BetaStudy
from sparsify.report.layouts.by_allocation import ByAllocation
from sparsify.report.layouts.compare import Comparison
from sparsify.report.layouts.correction import Corrections
from sparsify.report.layouts.curves import Curves
from sparsify.report.layouts.medians import Medians
from sparsify.report.layouts.perplexities import Perplexities
from sparsify.report.layouts.recovery import Recovery
from sparsify.report.layouts.search import Searches
from sparsify.report.layouts.seeds import Seeds
from sparsify.report.layouts.sensitivity import Sensitivity
from sparsify.runs import registry

LAYOUTS: dict[str, type[Layout]] = {
    "absorption": Absorption,
    "accuracy": Accuracies,
    "beta_study": BetaStudy,
    "by_allocation": ByAllocation,
    "compare": Comparison,
    "correction": Corrections,
    "curves": Curves,
    "medians": Medians,
    "perplexities": Perplexities,
    "recovery": Recovery,
    "search": Searches,
    "seeds": Seeds,
    "sensitivity": Sensitivity,
}
"""By the `layout` of a table's config."""


def load(name: str) -> Layout:
    """The layout of a table.

    Raises:
        UsageError: there is no such table, or its file has a key or a value that its kind of layout has not.
    """
    return read(registry.find("table", name))


def read(file: Path) -> Layout:
    """A layout from a file; see `load`."""
    tree, where = registry.read(file), f"configs/table/{file.name}"
    kind = LAYOUTS.get(str(tree.get("layout")))
    if kind is None:
        allowed = ", ".join(LAYOUTS)
        raise UsageError(f"{where} has no layout of that name", got=tree.get("layout"), allowed=allowed)
    return schema.load(kind, tree, where)
