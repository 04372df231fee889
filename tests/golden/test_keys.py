"""The keys of published cells are what they were when they were published, wherever code and files have moved since."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from sparsify import paths
from sparsify.runs import identity, registry
from sparsify.runs.planning import parts_of

FOLDER = paths.root() / "results" / "published"
PUBLISHED = sorted(file for file in FOLDER.glob("*/*/*.csv") if file.parent.name in registry.names("table"))
TEXTS = json.loads(Path(__file__).with_name("texts.json").read_text())
"""Content hashes of the texts that published cells were calibrated on."""

BY_HAND = {
    "2026-11-25_49e0e2c_sparsegpt": [
        f"experiment=absorption/{preset} pruner=sparsegpt allocator@allocator.inner=owl seed=0,1,2,3,4 "
        "allocator.strength=0.8,1.6"
        for preset in ("corrected", "controls")
    ]
    + ["experiment=absorption/plain pruner=sparsegpt allocator=owl seed=0,1,2,3,4"]
}
"""Sweeps of rows that no table makes, as the notes beside them say."""


@pytest.fixture(autouse=True)
def _texts(monkeypatch):
    def fingerprint(corpus, split, data, assets):
        return TEXTS[f"{json.loads(corpus)['name']} {split}"]

    monkeypatch.setattr(identity, "_fingerprint", fingerprint)
    monkeypatch.setattr("sparsify.data.benchmarks.fingerprint", lambda task: {"sha256": task})  # not part of run keys


def planned(file, model, scale):
    by_hand = BY_HAND.get(file.parts[-3])
    sweeps = [(None, text.split()) for text in by_hand] if by_hand else [(file.parent.name, [])]
    for table, overrides in sweeps:
        for part in parts_of(table, [*overrides, f"model={model}", f"scale={scale}"]):
            yield from (cell.key for cell in part.cells)


def test_there_are_published_keys():
    assert len(PUBLISHED) >= 14


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: f"{file.parts[-3]}/{file.stem}")
def test_published_keys_are_planned_today(file):
    name, scale = re.fullmatch(r"[a-z_0-9]+?_((?:smollm2|gemma3|qwen2\.5)-[\w.-]+?)_([a-z]+)", file.stem).groups()
    published = set(pd.read_csv(file, dtype={"key": str})["key"])
    assert published
    assert not published - set(planned(file, name, scale))


SHARED = [("table4", "table13", 60), ("seeds", "table15", 15), ("table4", "table15", 1)]
"""Published tables, others that have some of their cells, and how many at least."""


@pytest.mark.parametrize(("published", "table", "at_least"), SHARED)
def test_a_table_takes_what_another_one_has(published, table, at_least):
    (file,) = (f for f in PUBLISHED if f.parent.name == published and "smollm2" in f.stem and "paper" in f.stem)
    cells = [cell for part in parts_of(table, ["model=smollm2-135m", "scale=paper"]) for cell in part.cells]
    shared = {cell.key for cell in cells} & set(pd.read_csv(file, dtype={"key": str})["key"])
    assert len(shared) >= at_least
