"""Published tables come out of their own rows again, byte for byte."""

import shutil
from pathlib import Path

import pytest

from sparsify import paths
from sparsify.runs import registry

FOLDER = paths.root() / "results" / "published"
# Other CSV files (the swaps of Theorem 3.5) are rows of no table.
PUBLISHED = sorted(file for file in FOLDER.glob("*/*/*.csv") if file.parent.name in registry.names("table"))
TEXTS = (".md", ".csv", ".tex")


def test_there_are_published_rows():
    assert PUBLISHED


@pytest.mark.parametrize("rows", PUBLISHED, ids=lambda file: f"{file.parts[-3]}/{file.stem}")
def test_a_published_table_is_a_function_of_its_rows(rows, tmp_path):
    from sparsify.report.__main__ import report

    shutil.copytree(rows.parent, tmp_path / "copy")
    copy = tmp_path / "copy" / rows.name
    files = report(rows.parent.name, [], copy)
    for suffix in TEXTS:
        assert copy.with_suffix(suffix) in files
        assert copy.with_suffix(suffix).read_bytes() == rows.with_suffix(suffix).read_bytes()


def test_figures_are_written_and_the_same_twice(tmp_path):
    from sparsify.report.__main__ import report

    rows = next(file for file in PUBLISHED if file.stem.startswith("table1"))
    for name in ("one", "two"):
        shutil.copytree(rows.parent, tmp_path / name)
        report("table1", [], tmp_path / name / rows.name)
    figures = [Path(file.name) for file in (tmp_path / "one").glob("*.png")]
    assert {file.name.split("_smollm2")[0] for file in figures} == {"table1", "beta_curve", "layer_profile"}
    for file in figures:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_dirty_row_is_refused(tmp_path):
    from sparsify.errors import RecordError
    from sparsify.report.frame import read_long

    (tmp_path / "rows.csv").write_text("key,value\na,1\n")
    with pytest.raises(RecordError, match="no evaluation"):
        read_long(tmp_path / "rows.csv")
