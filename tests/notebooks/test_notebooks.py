"""Every notebook runs from top to bottom, at a small size, and is kept without outputs."""

import json
import os

import pytest

from sparsify import paths

FOLDER = paths.root() / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SMALL = {
    "error_growth": 'MODEL, WINDOWS, SEQLEN = "shape/tiny", 2, 16',
    "absorption": 'MODEL, WINDOWS, SEQLEN, SEEDS = "shape/tiny", 2, 16, 2',
    "losa": 'MODEL, WINDOWS, SEQLEN, SAMPLES = "shape/tiny", 4, 16, 8',
}
"""What is put below the cell tagged `parameters`."""


def name(file):
    return file.stem


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("file", NOTEBOOKS, ids=name)
def test_a_notebook_is_kept_without_outputs(file):
    cells = [cell for cell in json.loads(file.read_text(encoding="utf8"))["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=name)
def test_a_notebook_runs(file, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setitem(os.environ, "IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(file, as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source += f"\n{SMALL[file.stem]}"
    done = nbclient.NotebookClient(notebook, timeout=100, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in done.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in shown)
