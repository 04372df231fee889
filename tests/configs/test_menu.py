"""Cells are planned as Hydra would run them, and planning imports no torch."""

import dataclasses
import subprocess
import sys
from collections import Counter

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from sparsify import paths
from sparsify.runs import menu, planning, registry
from sparsify.runs.identity import plain
from sparsify.runs.planning import Part

SCALES = registry.names("scale")
TABLES = registry.names("table")
PARTS = [(table, tuple(part)) for table in TABLES for part in registry.read(registry.find("table", table))["parts"]]
CELLS = [
    [],
    ["scale=paper", "model=llama2-7b", "allocator=owl"],
    ["allocator=absorption", "perturbation@allocator.source=noise", "allocator.source.eta=0.1"],
    ["allocator=absorption", "allocator@allocator.inner=blend"],
    ["pruner=dsnot", "pruner@pruner.first=sparsegpt", "pruner.first.damp=0.1"],
    ["allocator=search", "search.trials=7"],
    ["model=hub", "model.id='a/b'"],
    ["eval=zeroshot", "eval.limit=20", "eval.tasks=[boolq,rte]"],
    ["eval=absorption", "calibration.windows=1"],
    ["data@calibration.text=wikitext2", "calibration.split=test"],
    ["scale=paper", "data@tuning.text=c4", "tuning.samples=5"],
    ["+allocator@allocator.parts.lsa=lsa", "allocator=blend"],
    ["+a_new_key={b: [1, 2]}", "sparsity=7e-1", "batch_size=null", "pattern='2:4'"],
    ["~logger"],
]


def by_hydra(overrides):
    with initialize_config_dir(str(paths.configs()), version_base="1.3"):
        return plain(compose("config", list(overrides)))


@pytest.mark.parametrize("overrides", CELLS, ids=" ".join)
def test_a_cell_is_composed_as_hydra_does(overrides):
    assert menu.compose(overrides) == by_hydra(overrides)


@pytest.mark.parametrize(("table", "part"), PARTS, ids=str)
@pytest.mark.parametrize("scale", registry.names("scale"))
def test_the_cells_of_a_table_are_composed_as_hydra_does(table, part, scale):
    jobs = planning.grid([*part, f"scale={scale}"])
    for job in (jobs[0], jobs[-1]):
        assert menu.compose(job) == by_hydra(job)


@pytest.mark.parametrize("overrides", [["pruner=wnda"], ["allocator.bta=1"], ["allocator@allocator.inner=owl"]])
def test_what_does_not_fit_the_menu_is_hydras_to_refuse(overrides):
    with pytest.raises((HydraException, OmegaConfBaseException)) as theirs:
        by_hydra(overrides)
    with pytest.raises(type(theirs.value)):
        menu.compose(overrides)


def test_a_cell_is_not_changed_by_another():
    first = menu.compose(["allocator=owl", "allocator.lam=0.1"])
    assert menu.compose(["allocator=owl"])["allocator"]["lam"] == 0.08
    assert first["allocator"]["lam"] == 0.1


@pytest.mark.parametrize("table", TABLES)
def test_a_plan_imports_no_torch(table, tmp_path):
    code = (
        "import sys; from sparsify.commands import plan; code = plan.main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'scipy', 'pandas'} & set(sys.modules);"
        "sys.exit(repr(heavy) if heavy else code)"
    )
    command = [sys.executable, "-c", code, f"table={table}", f"results={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{table}: " in done.stdout


def test_a_cell_of_two_parts_is_planned_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_RESULTS", str(tmp_path))
    parts = planning.parts_of("table1", ["grid.stable_sparsity=0.7"])
    keys = [cell.key for part in parts for cell in part.cells]
    assert len(keys) == len(set(keys))
    assert [len(part.cells) for part in parts] == [1, 3, 10, 0, 0]


@pytest.mark.parametrize("scale", SCALES)
def test_a_cell_that_is_measured_further_is_trained_once(scale, tmp_path, monkeypatch):
    """Table 5 asks for zero-shot before the parts that have the same cells without it."""
    monkeypatch.setenv("SPARSIFY_RESULTS", str(tmp_path))
    monkeypatch.setenv("SPARSIFY_DATA", str(tmp_path))
    (tmp_path / "alpaca_gpt4").mkdir()
    (tmp_path / "alpaca_gpt4" / "any.parquet").touch()  # a plan only hashes it
    parts = planning.parts_of("table5", [f"scale={scale}"])
    runs = [cell for part in planning.distinct(parts) for cell in part.cells]
    keys = [cell.key for cell in runs]
    assert len(keys) == len(set(keys)) == len({cell.key for part in parts for cell in part.cells})
    measured = [cell for cell in runs if "boolq" in cell.evaluation_keys]
    assert {cell.key for cell in measured} == {cell.key for cell in runs if cell.config["seed"] == 0}
    stages = {(cell.config.get("recovery") or {}).get("_target_", "").rpartition(".")[2] for cell in measured}
    assert {"", "LoRA", "MaskedLoRA"} <= stages


COUNTS = {
    ("table13", "embedded"): [1, 12, 1, 8, 2],
    ("table13", "paper"): [1, 90, 18, 36, 4],
    ("table15", "embedded"): [1, 2, 10, 2],
    ("table15", "paper"): [1, 24, 168, 48],
}
"""Cells of each part; the zero-shot ones of table 15 are those of its other parts, measured further."""


@pytest.mark.parametrize(("table", "scale"), COUNTS)
def test_tables_by_allocation_plan_every_cell_once(table, scale, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_RESULTS", str(tmp_path))
    parts = planning.parts_of(table, [f"scale={scale}"])
    assert [len(part.cells) for part in parts] == COUNTS[table, scale]
    cells = [cell for part in planning.distinct(parts) for cell in part.cells]
    assert {cell.state for cell in cells} == {"missing"}
    assert len(cells) == len({cell.key for cell in cells}) == len({cell.key for part in parts for cell in part.cells})


@pytest.mark.parametrize(
    ("table", "others", "scale", "shared"),
    [
        ("table13", ["table4", "quantisation"], "embedded", 1 + 3 + 1 + 2),  # dense, rules and descent at 2:8, bits
        ("table13", ["table4", "quantisation"], "paper", 1 + 72 + 9 + 4),  # without ATP at half its maximum
        ("table15", ["table4", "seeds"], "embedded", 1 + 3),  # dense, Wanda with uniform, ATP and descent
    ],
)
def test_a_table_takes_the_cells_of_others(table, others, scale, shared, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_RESULTS", str(tmp_path))

    def keys(name):
        return {cell.key for part in planning.parts_of(name, [f"scale={scale}"]) for cell in part.cells}

    assert len(keys(table) & set().union(*map(keys, others))) == shared


def test_a_cell_that_is_done_and_to_be_measured_further_counts_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_RESULTS", str(tmp_path))

    def as_after_perplexity(part):
        states = ["missing" if "boolq" in cell.evaluation_keys else "done" for cell in part.cells]
        pairs = zip(part.cells, states, strict=True)
        return Part(part.overrides, [dataclasses.replace(cell, state=state) for cell, state in pairs])

    parts = [as_after_perplexity(part) for part in planning.parts_of("table5", [])]
    states = Counter(cell.state for part in planning.distinct(parts) for cell in part.cells)
    assert states == {"missing": 7, "done": 6}  # of the dense model there is one cell
