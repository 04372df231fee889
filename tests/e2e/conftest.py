"""Cells of a tiny random model through the command line, in this process."""

import json
from types import SimpleNamespace

import pytest

TINY = (
    "model=shape/tiny",
    *(f"{part}.{size}" for part in ("calibration", "heldout", "test") for size in ("windows=2", "seqlen=32")),
    "device=cpu",
)


@pytest.fixture(scope="session")
def tiny():
    """Overrides that make a cell take a tenth of a second."""
    return TINY


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


@pytest.fixture
def go(results, capsys):
    """Run `python -m sparsify` with overrides; exit code, output and errors."""
    from sparsify.commands import cli

    def run(*overrides, sweep=False):
        capsys.readouterr()
        code = cli.launch([*(["-m"] if sweep else []), *TINY, f"results={results}", *overrides])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture
def records(results):
    """Every record by the sparsity or pattern it was asked for."""

    def read():
        found = [json.loads(file.read_text()) for file in results.glob("runs/*/record.json")]
        patterns = [r["science"]["pattern"] for r in found]
        return {p if p != "unstructured" else r["science"]["sparsity"]: r for p, r in zip(patterns, found, strict=True)}

    return read


@pytest.fixture
def files(results):
    """Bytes and time of every record file."""

    def read():
        return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in results.glob("runs/*/record.json")}

    return read
