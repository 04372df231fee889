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


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, make_model):
    """A tiny model with a tokenizer, the same with a NaN, and texts of several lengths."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("inputs")
    words = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    model = make_model()
    for name in ("model", "nan"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    (folder / "empty.txt").write_text(" \n")
    (folder / "short.txt").write_text("a b " * 10)
    (folder / "long.txt").write_text("a b c " * 100)
    return folder
