"""Every table's file is what its kind of layout says, and a misspelt one is refused with the near match."""

import dataclasses

import pytest

from sparsify import paths
from sparsify.errors import UsageError
from sparsify.report import layouts
from sparsify.report.layouts.by_allocation import ByAllocation
from sparsify.runs import registry

TABLES = registry.names("table")
FOLDER = paths.configs() / "table"

BROKEN = [
    ("table1", "show: allocator.beta", "shwo: allocator.beta", "did you mean show"),
    ("table1", "rows:", "row:", "did you mean rows"),
    ("table1", "layout: perplexities", "layout: perplexity", "Allowed: absorption"),
    ("table1", "beta_curve, layer_profile]", "beta_curves]", "No figure of that name"),
    ("table2", "gain: ATP", "", "lacks gain"),
    ("table3", "averaged: [owl, alphapruning]", "averaged: owl", "a list"),
    ("table7", "where: {allocator: owl}", "where: owl", "a mapping"),
    ("error_growth", "log: true", "log: yes please", "wrong kind of value"),
    ("error_growth", "  - {label: relative error, curve: error_growth}", "  - {label: relative error}", "needs one of"),
    ("reference", "within: 0.01", "wihtin: 0.01", "did you mean within"),
    ("seeds", "label: OWL", "lable: OWL", "did you mean label"),
    ("absorption", "pruning: pruned_70 ", "prunning: pruned_70 ", "did you mean pruning"),
    ("sensitivity", "label: depth", "lable: depth", "did you mean label"),
    ("table13", "by: quantiser.allocator", "of: quantiser.allocator", "Allowed: label, where, group, by"),
    ("table15", "allocations:", "allocation:", "did you mean allocations"),
    ("table15", "  OWL: owl", "  OWL: [owl]", "text"),
    ("beta_study", "steps: [1, 2, 4]", "steps: [1, two]", "a whole number"),
]


def conditions(node):
    """Every `where` inside a layout."""
    if isinstance(node, dict):
        return [node] if "allocator" in node else []
    if isinstance(node, list):
        return [found for item in node for found in conditions(item)]
    if dataclasses.is_dataclass(node):
        return [found for field in dataclasses.fields(node) for found in conditions(getattr(node, field.name))]
    return []


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_what_its_layout_says(name):
    layout = layouts.load(name)
    assert layout.title
    assert layout.parts
    assert type(layout) is layouts.LAYOUTS[layout.layout]
    for where in conditions(layout):
        assert where["allocator"] in registry.names("allocator")


def test_rows_and_columns_by_allocation_are_of_components_that_there_are():
    tables = [layouts.load(name) for name in TABLES]
    tables = [table for table in tables if isinstance(table, ByAllocation)]
    assert len(tables) >= 2
    for table in tables:
        assert set(table.allocations.values()) <= set(registry.names("allocator"))
        for where in (row.where for row in table.rows):
            assert where.get("pruner", "wanda") in registry.names("pruner")
            assert where.get("method", "oneshot") in registry.names("method")


def test_every_kind_of_layout_is_of_a_table():
    assert {layouts.load(name).layout for name in TABLES} == set(layouts.LAYOUTS)


@pytest.mark.parametrize(("name", "right", "wrong", "message"), BROKEN, ids=[f"{b[0]}: {b[2]}" for b in BROKEN])
def test_a_misspelt_table_is_refused(name, right, wrong, message, tmp_path):
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf8")
    assert right in text
    file = tmp_path / f"{name}.yaml"
    file.write_text(text.replace(right, wrong), encoding="utf8")
    with pytest.raises(UsageError, match=message) as raised:
        layouts.read(file)
    assert f"{name}.yaml" in str(raised.value)
